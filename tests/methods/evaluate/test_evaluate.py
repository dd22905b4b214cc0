"""What a report says of two models is what comes out when both are loaded whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div
from torch.utils.benchmark import Measurement, TaskSpec
from transformers import AutoModelForCausalLM

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.evaluate import timing
from moeflow.methods.evaluate.steps import here, speed
from moeflow.methods.evaluate.timing import Speed
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, naee, unified
from moeflow.methods.slim.methods import Slimming
from moeflow.model.layout import headers
from moeflow.model.quiet import cache_name
from moeflow.model.spec import CheckpointSpec
from moeflow.report.figures import read_figures
from moeflow.run import StepFailed
from moeflow.step import Context, Spec, Step, step, upstream
from moeflow.store import Store
from tests import running, tiny
from tests.models import calibrated, graph
from tests.slimmed import FOUR


@step("test.strange", version=1, spec=lambda config: Spec(CheckpointSpec(config, 0, 0, 0, 0, 0)))
def strange(context: Context, *, config: dict[str, Any]) -> None:
    """A checkpoint that has nothing but a configuration."""
    (context.out / "config.json").write_text(json.dumps(config))


def report_of(store: Store, report: Step) -> dict[str, Any]:
    return json.loads(store.artifact(report.key).file("report.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Step, Path]:
    folder = tmp_path_factory.mktemp("evaluate")
    model = running.model_in(tiny.write("qwen2_moe", folder / "model"))
    target = graph(model, running.matrix_of(folder))
    store = running.store_in(folder)
    running.run(store, target)
    store.fetch(target.key, folder / "out")
    return store, target, folder


@torch.inference_mode()
def test_loss_divergence_and_agreement_are_those_of_the_whole_models(done: tuple[Store, Step, Path]) -> None:
    store, target, folder = done
    rows = running.reports(store, target)
    ids = torch.from_numpy(running.array_of(running.matrix_of(folder)))
    first, second = (AutoModelForCausalLM.from_pretrained(folder / n).eval() for n in ("model", "out"))
    one, two = first(ids, labels=ids), second(ids, labels=ids)
    log_p, log_q = (m.logits[:, :-1].log_softmax(-1) for m in (one, two))
    divergence = kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).float().mean()
    assert rows["loss (token matrix)"]["original"] == pytest.approx(float(one.loss), abs=1e-5)
    assert rows["loss (token matrix)"]["compressed"] == pytest.approx(float(two.loss), abs=1e-5)
    assert rows["perplexity (token matrix)"]["compressed"] == pytest.approx(float(two.loss.exp()), rel=1e-5)
    assert rows["KL to the original (token matrix)"]["compressed"] == pytest.approx(float(divergence), abs=1e-5) != 0
    assert rows["top-1 agreement (token matrix)"]["compressed"] == pytest.approx(float(agreement), abs=1e-6)


def test_sizes_are_counted_and_speed_is_measured(done: tuple[Store, Step, Path]) -> None:
    store, target, folder = done
    rows = running.reports(store, target)
    for side, name in (("original", "model"), ("compressed", "out")):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        assert rows["parameters"][side] == sum(p.numel() for p in model.parameters())
        assert rows["resident bytes"][side] == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        assert rows["prefill"][side] > 0 and rows["decode"][side] > 0
    assert rows["bytes"]["compressed"] == sum(f.stat().st_size for f in (folder / "out").glob("*.safetensors"))
    assert rows["experts per layer"] == {
        "name": "experts per layer",
        "original": 8,
        "compressed": 5,
        "unit": "",
        "figure": "experts",
    }


def test_packed_models_are_planned_as_large_as_transformers_loads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where that is more than there is, their speed is left out, instead of the process killed."""
    model = running.model_in(tiny.write("mixtral", tmp_path / "model"))
    packed = unified.slim(calibrated(model, tmp_path), Slimming("round_to_nearest", **FOUR))
    whole, small = (checkpoint.checkpoint_of(m).spec.output for m in (model, packed))
    loads = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert whole.loaded() == pytest.approx(sum(p.nbytes for p in loads.parameters()), rel=0.05)
    assert small.nbytes < 0.6 * whole.nbytes and small.loaded() == pytest.approx(whole.loaded(), rel=0.05)
    timed = speed(*(checkpoint.checkpoint_of(m) for m in (model, packed)), machine=here(), length=8)
    assert timed.spec.memory > 1.9 * loads.num_parameters() * 4 > timed.spec.reads
    store, free = running.store_in(tmp_path), int(1.5 * whole.nbytes)  # both files, but not both models
    monkeypatch.setattr(timing, "device_and_memory", lambda: ("cpu", free))
    running.run(store, running.alone(timed))
    (note,) = report_of(store, timed)["notes"]
    assert note.startswith("speed is left out: both models need") and f"{free:,} are free" in note
    rows = {r["name"]: r for r in report_of(store, timed)["rows"]}
    assert rows["resident bytes"]["compressed"] is None


def test_resident_bytes_are_those_of_the_engine_that_keeps_packed_weights(tmp_path: Path) -> None:
    """With a place for both models or not: they are counted."""
    model = running.model_in(tiny.write("mixtral", tmp_path / "model"))
    packed = unified.slim(calibrated(model, tmp_path), Slimming("round_to_nearest", **FOUR))
    both, store = tuple(checkpoint.checkpoint_of(m) for m in (model, packed)), running.store_in(tmp_path)
    kept = {}
    for engine in ("", "vllm"):
        timed = speed(*both, machine=here(), length=8, **({"engine": engine} if engine else {}))
        running.run(store, running.alone(timed))
        kept[engine] = {r["name"]: r for r in report_of(store, timed)["rows"]}["resident bytes"]
    assert kept["vllm"]["original"] == pytest.approx(kept[""]["original"], rel=0.02)
    files = [store.artifact(s.key) for s in both]
    weights = [sum(t.nbytes for t in headers(f).values()) for f in files]
    assert [kept["vllm"][side] for side in ("original", "compressed")] == weights
    assert kept["vllm"]["compressed"] < 0.6 * kept[""]["compressed"]
    heldout = compare.HeldOut(running.matrix_of(tmp_path).spec, length=16)
    for engine, told in {"vllm": "vllm", "moeflow": None}.items():
        reports = compare.reports(model, packed, heldout, Pass(), engine=engine)
        assert [r.params.get("engine") or None for r in reports if r.name == "evaluate.speed"] == [told]


def test_speeds_have_quartiles_and_where_they_overlap_no_difference_was_measured(done: tuple[Store, Step, Path]) -> None:
    store, target, _ = done
    rows = running.reports(store, target)
    (written,) = (report_of(store, r) for r in target.reports if r.name == "evaluate.speed")
    same = []
    for name in ("prefill", "decode"):
        low, middle, high = (rows[name + part] for part in (", lower quartile", "", ", upper quartile"))
        assert all(0 < low[side] <= middle[side] <= high[side] for side in ("original", "compressed"))
        if low["original"] <= high["compressed"] and low["compressed"] <= high["original"]:
            same.append(name)
    said = f"{' and '.join(same)}: no difference measured, the quartiles of 7 alternating rounds overlap"
    assert written["notes"] == ([said] if same else [])


def test_quartiles_overlap_unless_one_range_lies_above_the_other() -> None:
    slow, fast, between = Speed(10, 9, 11), Speed(20, 19, 21), Speed(15, 10.5, 19.5)
    assert not slow.overlaps(fast) and not fast.overlaps(slow)
    assert between.overlaps(slow) and slow.overlaps(between) and between.overlaps(fast) and slow.overlaps(slow)
    seconds = Measurement(1, [4.0, 1.0, 2.0, 3.0, 5.0], TaskSpec("prefill", setup=""))
    assert Speed.of(60, seconds) == Speed(20, 15, 30)


def test_a_model_that_cannot_be_run_whole_is_reported_without_its_speed(tmp_path: Path) -> None:
    """Such as one of a class that this transformers does not know; the run is not lost for it."""
    store, other = running.store_in(tmp_path), strange(config={"model_type": "of_tomorrow", "max_position_embeddings": 64})
    timed = speed(other, other, machine={}, length=16)
    running.run(store, timed)
    (note,) = report_of(store, timed)["notes"]
    assert (
        note.startswith("speed is left out: measuring it failed with ValueError: ") and "of_tomorrow" in note and "\n" not in note
    )
    assert [r["original"] for r in report_of(store, timed)["rows"]] == [None] * 3


def test_every_choice_tells_its_loss_beside_the_baselines(done: tuple[Store, Step, Path]) -> None:
    store, target, _ = done
    for choice in running.choices(store, target).values():
        assert set(choice["baselines"]) == {"random", "frequency", "router_score", "reap", "aimer"}
        best = choice["loss"]["value"]
        assert best == min(choice["losses"].values()) <= choice["runner_up"]["loss"]
        assert all(best <= b["loss"] and len(b["keep"]) == 5 for b in choice["baselines"].values())
        assert 0 < choice["loss"]["of_output"] < 1.5 and choice["loss"]["tokens"] == 128


def test_another_ratio_or_criterion_never_calibrates_again(done: tuple[Store, Step, Path]) -> None:
    store, _, folder = done
    model, matrix = running.model_in(folder / "model"), running.matrix_of(folder)
    by_score = graph(model, matrix, how="reap")
    for target in (graph(model, matrix, keep=4), by_score):
        ran = {s.name for s in running.run(store, target).steps if s.state == "run"}
        assert ran == {
            "prune.choose", "rewrite.experts", "checkpoint.assemble", "checkpoint.assemble_as", "evaluate.size",
            "calibrate.advance", "evaluate.quality", "evaluate.speed", *(["evaluate.layers"] if target is not by_score else []),
        }  # fmt: skip


@pytest.mark.parametrize("how", ["random", "frequency", "router_score", "reap", "aimer"])
def test_a_search_by_score_keeps_what_the_exact_search_calls_its_baseline(how: str, done: tuple[Store, Step, Path]) -> None:
    store, target, folder = done
    scored = graph(running.model_in(folder / "model"), running.matrix_of(folder), how=Search(how, measured=128))
    running.run(store, scored)
    exact, by_score = running.choices(store, target), running.choices(store, scored)
    for layer, choice in by_score.items():
        theirs = exact[layer]["baselines"]
        assert choice["keep"] == theirs[how]["keep"]
        assert choice["loss"]["value"] == pytest.approx(theirs[how]["loss"], rel=1e-3) and choice["loss"]["tokens"] == 128
        for name, measured in choice["baselines"].items():
            assert measured["of_output"] == pytest.approx(theirs[name]["of_output"], rel=1e-3)
    rows = running.reports(store, scored)
    told = rows[f"layer error, by {how}"] | {"name": "layer error, as chosen"}
    assert rows["layer error, as chosen"] == told | {"figure": "layer_error", "better": "lower"}


@pytest.mark.parametrize("how", ["random", "frequency", "router_score", "reap", "aimer"])
def test_a_search_by_score_measures_no_errors_unless_told_and_reads_no_inputs(how: str, done: tuple[Store, Step, Path]) -> None:
    store, target, folder = done
    scored = graph(running.model_in(folder / "model"), running.matrix_of(folder), how=how)
    running.run(store, scored)
    exact = running.choices(store, target)
    for layer, choice in running.choices(store, scored).items():
        assert choice["keep"] == exact[layer]["baselines"][how]["keep"]
        assert (choice["loss"], choice["baselines"], choice["runner_up"]) == (None, {}, None)
    assert not [name for name in running.reports(store, scored) if name.startswith("layer error")]
    (step, *_) = (s for s in upstream([scored]) if s.name == "prune.choose")
    (same, *_) = (s for s in upstream([target]) if s.name == "prune.choose")
    inputs = 128 * 16 * 4
    assert step.spec.reads + inputs <= same.spec.reads and (how == "aimer" or step.spec.reads < inputs)


def test_about_so_many_tokens_of_every_shard_are_measured_as_asked(done: tuple[Store, Step, Path]) -> None:
    store, _, folder = done
    scored = graph(running.model_in(folder / "model"), running.matrix_of(folder), how=Search("reap", measured=31))
    running.run(store, scored)
    assert {choice["loss"]["tokens"] for choice in running.choices(store, scored).values()} == {32}


def test_a_score_that_is_no_number_ends_the_search(tmp_path: Path) -> None:
    folder = tiny.write("mixtral", tmp_path / "model")
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"].fill_(1e38)
    save_file(tensors, weights, metadata={"format": "pt"})
    target = graph(running.model_in(folder), running.matrix_of(tmp_path), how="reap")
    with pytest.raises(StepFailed, match=r"layer 1 gives outputs that are NaN or infinite; compute in another precision"):
        running.run(running.store_in(tmp_path), target)


def test_a_model_without_a_tokenizer_is_evaluated_on_the_token_matrix_and_the_report_says_so(
    done: tuple[Store, Step, Path],
) -> None:
    store, target, _ = done
    notes = [n for r in target.reports if r.name != "evaluate.speed" for n in report_of(store, r)["notes"]]
    assert notes == ["the model has no tokenizer: held-out text is left out, the loss on the token matrix stands for it"]


def test_too_many_subsets_and_a_partial_record_are_refused_before_any_work(tmp_path: Path) -> None:
    wide = running.model_in(tiny.write("olmoe", tmp_path / "wide", num_experts=64))
    matrix = data.tokens(running.matrix_of(tmp_path), wide, Sample(8, 16))
    with pytest.raises(
        ValueError, match=r"48 of 64 experts .* over 20,000: .*another search .genetic, swap. or a score .random, .*reap"
    ):
        naee.prune(calibrate.run(wide, matrix, Pass(batch=4, shard=4)), keep=48)
    model = running.model_in(tiny.write("mixtral", tmp_path / "model"))
    part = calibrate.run(model, matrix, Pass(batch=4, shard=4, record=32))
    with pytest.raises(ValueError, match="loss='batch-sum' .* needs the inputs of all tokens"):
        naee.prune(part, 6, Search("layerwise", loss="batch-sum", batch=4))
    uneven = calibrate.run(model, matrix, Pass(shard=6))
    with pytest.raises(ValueError, match="shard=6 sequences are no whole batches of search.batch=4"):
        naee.prune(uneven, 6, Search("layerwise", loss="batch-sum", batch=4))


def test_every_report_has_the_baselines_beside_the_choice(done: tuple[Store, Step, Path]) -> None:
    store, target, _ = done
    rows, chosen = running.reports(store, target), running.choices(store, target)
    for name in ("random", "frequency", "router_score", "reap", "aimer"):
        of_output = [c["baselines"][name]["of_output"] for c in chosen.values()]
        assert rows[f"layer error, by {name}"]["compressed"] == pytest.approx(sum(of_output) / len(of_output))
        assert rows["layer error, as chosen"]["compressed"] <= rows[f"layer error, by {name}"]["compressed"]


def test_a_model_with_too_few_positions_is_reported_without_its_speed(tmp_path: Path) -> None:
    model = running.model_in(tiny.write("mixtral", tmp_path / "model", max_position_embeddings=16))
    target = graph(model, running.matrix_of(tmp_path))
    store = running.store_in(tmp_path)
    running.run(store, target)
    notes = [n for r in target.reports for n in json.loads(store.artifact(r.key).file("report.json").read_text())["notes"]]
    assert "speed is left out: the model's 16 positions leave none before the 32 that are decoded" in notes


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_an_unknown_precision_is_refused_when_the_graph_is_built(dtype: str, tmp_path: Path) -> None:
    model = running.model_in(tiny.write("mixtral", tmp_path / "model"))
    matrix = data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16))
    with pytest.raises(ValueError, match=f"dtype='{dtype}' is not known; choose one of auto, float64, float32"):
        calibrate.run(model, matrix, Pass(batch=4, shard=4, dtype=dtype))


def test_the_cache_is_asked_for_as_this_release_of_transformers_calls_it(tmp_path: Path) -> None:
    class Renamed(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, cache: Any = None, use_cache: bool = False) -> None: ...

    assert cache_name(Renamed()) == "cache"
    model = AutoModelForCausalLM.from_pretrained(tiny.write("mixtral", tmp_path / "model"))
    assert cache_name(model) in model(torch.ones(1, 4, dtype=torch.long), use_cache=True)


def test_the_steps_that_report_say_before_the_run_which_figures_they_will_report(done: tuple[Store, Step, Path]) -> None:
    store, target, _ = done
    figures = read_figures(store, [r.key for r in target.reports])
    assert {f.word for f in figures if f.figure} == {word for r in target.reports for word in r.spec.figures}
    assert {"kl[token matrix]", "bytes", "prefill", "layer_error"} <= {f.word for f in figures}
    (kl,) = (f for f in figures if f.figure == "kl")
    assert kl.items == 8 and kl.interval and kl.interval[0] < (kl.compressed or 0) < kl.interval[1]
