"""MoE-I² and what moeflow puts beside it, whole: from a checkpoint to one that loads, for every family."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moeflow.arch import Family
from moeflow.cli import app
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.decompose import steps as decompose
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.graph import Calibration, Model, Pass, Sample
from moeflow.methods.prune import genetic
from moeflow.methods.prune.counts import Counts
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, moei2
from moeflow.model.checkpoint import Tensors, read_moe
from moeflow.model.formats import Format, format_of
from moeflow.model.layout import Folder, headers, read_config
from moeflow.run.outcome import StepFailed
from moeflow.run.plan import plan
from moeflow.sizes import bytes_text
from moeflow.step import Step, upstream
from moeflow.store import Store
from tests import running, tiny

OURS = (Counts(0.75), Search("swap"))
COUNTS = {f.name for f in fields(Counts)}
PAPER = (Counts(0.75, rule="paper"), Search("genetic", best=2, span=2, inputs="progressive"))


def calibrated(model: Model, folder: Path) -> Calibration:
    matrix = data.tokens(running.matrix_of(folder), model, Sample(8, 16))
    return calibrate.run(model, matrix, Pass(batch=2, shard=4, stage=2))


def whole(model: Model, folder: Path, *, ratio: float, how: tuple[Counts, Search], cut: dict[str, Any]) -> Step:
    seen = calibrated(model, folder)
    pruned = moei2.prune(seen, *how)
    small = moei2.decompose(calibrated(pruned, folder), Decomposition(ratio=ratio, **cut))
    compared = compare.reports(model, small, compare.HeldOut("nowhere.txt", 4, 16), Pass(2), tokens=seen.tokens)
    return checkpoint.checkpoint_of(small).reporting(*(r for r in compared if r.name != "evaluate.speed"))


def fetched(store: Store, target: Step, folder: Path) -> Path:
    store.fetch(target.key, folder)
    return folder


def formats(folder: Path) -> dict[int, Format]:
    config, tensors = read_config(Folder(folder)), headers(Folder(folder))
    shapes = {n: t.shape for n, t in tensors.items()}
    return {i: format_of(shapes, config, i) for i in Family.of(config).moe_layers}


@pytest.mark.parametrize(
    ("how", "cut"),
    [
        (OURS, {"svd": "whitened", "ranks": "global"}),
        (PAPER, {"svd": "vanilla", "ranks": "paper", "importance": "lm_loss"}),
    ],
    ids=["ours", "paper"],
)
@torch.inference_mode()
def test_what_comes_out_loads_and_is_as_far_from_the_original_as_reported(
    how: tuple[Counts, Search], cut: dict[str, Any], family: Path, tmp_path: Path
) -> None:
    model, store = running.model_in(family), running.store_in(tmp_path)
    target = whole(model, tmp_path, ratio=0.3, how=how, cut=cut)
    planned = plan([target, *target.reports], store)
    outcome = running.run(store, target)
    # a layer that keeps all its experts is the layer it was, and what depends on it only is found by its content
    assert set(planned.keys("run")) >= set(outcome.ran) and not planned.problems
    made = {s.key: s for s in outcome.steps if s.key in outcome.ran}
    rows = [r for r in planned.rows if r.key in made and not r.name.startswith("sources.file")]
    # counts and ranks are decided on the way: what a plan says of them is what their budget allows
    assert sum(r.reads for r in rows) == pytest.approx(sum(made[r.key].reads for r in rows), rel=0.15)
    # and of forks what there can be: whether a group of a limited router can spare an expert depends on the counts
    assert 0.9 < sum(r.writes for r in rows) / sum(made[r.key].writes for r in rows) < 1.3
    out = fetched(store, target, tmp_path / "out")
    experts, found = 8 * len(model.moe_layers), formats(out)
    assert sum(f.experts for f in found.values()) == round(0.75 * experts)
    assert any(f.low_rank for f in found.values())  # a budget may leave a whole layer as it is
    first, second = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (family, out))
    ids = torch.from_numpy(running.array_of(running.matrix_of(tmp_path)))
    log_p, log_q = (m(ids).logits[:, :-1].log_softmax(-1) for m in (first, second))
    divergence = kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    row = running.reports(store, target)["KL to the original (token matrix)"]
    assert row["compressed"] == pytest.approx(float(divergence), rel=1e-3) != 0
    assert running.run(store, whole(model, tmp_path, ratio=0.3, how=how, cut=cut)).ran == []


def expert_bytes(folder: Path) -> int:
    return sum(t.nbytes for n, t in headers(Folder(folder)).items() if ".experts." in n)


@torch.inference_mode()
def test_full_rank_is_the_model_itself_where_it_is_forced(tmp_path: Path) -> None:
    source, store = tiny.write("mixtral", tmp_path / "model"), running.store_in(tmp_path)
    target = checkpoint.checkpoint_of(
        moei2.decompose(calibrated(running.model_in(source), tmp_path), Decomposition(rank=32, force=True))
    )
    running.run(store, target)
    ids = torch.arange(3, 30)[None]
    folders = (source, fetched(store, target, tmp_path / "out"))
    one, other = (AutoModelForCausalLM.from_pretrained(f).eval()(ids).logits for f in folders)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_bytes_are_within_the_budget_to_one_component(tmp_path: Path) -> None:
    source = tiny.write("mixtral", tmp_path / "model")
    store, model = running.store_in(tmp_path), running.model_in(source)
    seen = calibrated(model, tmp_path)
    before = expert_bytes(source)
    for ratio in (0.3, 0.55):
        target = checkpoint.checkpoint_of(moei2.decompose(seen, Decomposition(ratio=ratio)))
        running.run(store, target)
        out = fetched(store, target, tmp_path / f"out-{ratio}")
        component = (48 + 32) * 4
        # gate and up go together, so that what is left over is less than one component of each
        assert 0 <= (1 - ratio) * before - expert_bytes(out) < 2 * component
        assert not any("gate" in n and t.shape[0] == 0 for n, t in headers(Folder(out)).items())


def test_the_same_count_everywhere_and_whole_matrices_make_the_familys_own_checkpoint(tmp_path: Path) -> None:
    source = tiny.write("olmoe", tmp_path / "model")
    store = running.store_in(tmp_path)
    target = checkpoint.checkpoint_of(moei2.prune(calibrated(running.model_in(source), tmp_path), Counts(0.75, rule="uniform")))
    running.run(store, target)
    config = read_config(Folder(fetched(store, target, tmp_path / "out")))
    assert config["model_type"] == "olmoe" and config["num_experts"] == 6 and "moeflow_layers" not in config


def test_a_compressed_checkpoint_is_a_source_like_any_other(tmp_path: Path) -> None:
    """Non-uniform, low-rank layers are fetched, calibrated, dropped from again, and told apart from a damaged checkpoint."""
    source, store = tiny.write("qwen3_moe", tmp_path / "model"), running.store_in(tmp_path)
    first = whole(running.model_in(source), tmp_path, ratio=0.3, how=OURS, cut={})
    running.run(store, first)
    out = fetched(store, first, tmp_path / "out")
    again = running.model_in(out)
    target = checkpoint.checkpoint_of(moei2.prune(calibrated(again, tmp_path), Counts(12), Search("enumerate")))
    running.run(store, target)
    found = formats(fetched(store, target, tmp_path / "again"))
    assert sum(f.experts for f in found.values()) == 12 and all(f.low_rank for f in found.values())
    config = json.loads((out / "config.json").read_text())
    config["moeflow_layers"][0]["experts"] += 1
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json needs . ranks .* of each matrix in layer 0; correct 'moeflow_layers'"):
        running.model_in(out)
    config["moeflow_layers"][0] = {"experts": config["moeflow_layers"][0]["experts"]}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json says that layer 0 has . experts, its tensors say . experts, gate of ranks"):
        running.model_in(out)
    config["moeflow_layers"].pop()
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="2 entries in 'moeflow_layers' for 3 layers"):
        running.model_in(out)


def test_a_layers_own_best_is_what_spans_of_one_layer_and_of_one_set_choose(tmp_path: Path) -> None:
    source, store = tiny.write("mixtral", tmp_path / "model"), running.store_in(tmp_path)
    seen = calibrated(running.model_in(source), tmp_path)

    def chosen(**how: Any) -> dict[int, list[int]]:
        pruned = moei2.prune(seen, Counts(0.5, rule="uniform"), Search("enumerate", **how))
        running.run(store, *pruned.choices)
        made = [json.loads(store.artifact(c.key).file("choice.json").read_text()) for c in pruned.choices]
        return {c["layer"]: c["keep"] for c in made}

    best = chosen(best=1, span=1)
    assert chosen(best=3, span=1) == best  # T=1
    assert chosen(best=1, span=2) == best  # K=1
    assert chosen(best=3, span=3) != best  # and the span does choose otherwise


def test_an_expert_with_too_few_tokens_is_cut_by_its_weights_or_stays_whole_and_it_is_said(tmp_path: Path) -> None:
    source, store = tiny.write("mixtral", tmp_path / "model"), running.store_in(tmp_path)
    seen = calibrated(running.model_in(source), tmp_path)
    for rare in ("weights", "keep"):
        small = moei2.decompose(seen, Decomposition(ratio=0.3, least=30, rare=rare))
        target = checkpoint.checkpoint_of(small)
        outcome = running.run(store, target)
        made = store.artifact(target.key)  # whose folder goes with it
        told = running.facts_of(made.folder(), "decompose.layer")
        experts = [e for (layer,) in told.values() for e in layer["experts"]]
        few = [e for e in experts if e["tokens"] < 30]
        assert few and len(few) < len(experts)
        # a budget may leave a matrix whole by itself, but never whiten it with too few tokens
        assert {e["by"] for e in few} == ({"vanilla", "whole"} if rare == "weights" else {"whole"})
        assert all(e["by"] in ("whitened", "whole") for e in experts if e not in few)
        notes = [n for step in outcome.steps for n in step.notes]
        assert any("saw fewer than 30 tokens" in n for n in notes)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"keep": 0.6, "rule": "uniform"}, "14 experts are not the same legal number in each of 3 layers; nearest: 12 or 15"),
        ({"keep": 0.1}, "no legal counts add up to 2 experts; nearest: 6"),
        ({"rule": "best"}, "rule='best' is not known; choose one of uniform, paper, exact"),
        ({"method": "layerwise"}, "method='layerwise' finds no sets .*; choose one of enumerate, genetic, swap"),
        ({"best": 200, "span": 3}, "are 8,000,000 combinations, over 10,000; lower K or T"),
        ({"protected": ((0, 9),)}, "must be different experts between 0 and 7"),
        ({"protected": ((5, 1),)}, "protected names 5, which is no layer with experts"),
        ({"protected": ((5, 1, 2),)}, "must be pairs of a layer and an expert"),
        ({"grid": 1}, "grid=1 counts must be at least 2"),
    ],
)
def test_a_pruning_that_cannot_work_is_refused_when_the_graph_is_built(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    seen = calibrated(running.model_in(tiny.write("mixtral", tmp_path / "model")), tmp_path)
    with pytest.raises(ValueError, match=said):
        counts = Counts(**{"keep": 0.75} | {n: v for n, v in given.items() if n in COUNTS})
        moei2.prune(seen, counts, Search(**{"method": "swap"} | {n: v for n, v in given.items() if n not in COUNTS}))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ratio": 1.0}, "ratio=1.0 of the parameters cannot be removed"),
        ({"ratio": 0.3, "svd": "randomised"}, "svd='randomised' is not known"),
        ({"ratio": 0.3, "ranks": "best"}, "ranks='best' is not known; choose one of uniform, paper, global"),
        ({"ratio": 0.3, "rare": "drop"}, "rare='drop' is not known; choose one of weights, keep"),
        ({"rank": 20}, r"rank=20 is above 19.2, where the factors of a \[.*\] matrix are as large as itself"),
        ({"rank": 33, "force": True}, "rank=33 must lie between 1 and 32"),
        ({"rank": 8, "ratio": 0.3}, "give one of them"),
        ({"ratio": 0.97, "ranks": "uniform"}, "leaves rank 0.576 in layer 0, below r_min=1"),
        ({"ratio": 0.99}, "ratio=0.99 cannot be had with ranks from 1 in multiples of 1; the nearest is 0.9479"),
        ({"ratio": 0.6, "multiple": 64}, "ratio=0.6 cannot be had with ranks from 1 in multiples of 64; the nearest is 0"),
        ({"ratio": 0.3, "r_min": 0}, "r_min=0 must be at least 1"),
        ({"ratio": 0.3, "ranks": "paper", "alpha": -3.0}, "alpha=-3.0 must be at least 0"),
        ({"ratio": 0.3, "ranks": "uniform", "rare": "keep"}, "rare='keep' lets the others pay"),
        ({"ratio": 0.3, "svd": "vanilla"}, "ranks='global' goes by what whitening loses"),
        ({"ratio": 0.3, "ranks": "paper", "r_min": 30}, "average rank 13.44 cannot be had"),
    ],
)
def test_a_decomposition_that_cannot_work_is_refused_when_the_graph_is_built(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    seen = calibrated(running.model_in(tiny.write("mixtral", tmp_path / "model")), tmp_path)
    with pytest.raises(ValueError, match=said):
        moei2.decompose(seen, Decomposition(**given))


def test_a_compressed_checkpoint_with_a_damaged_factor_is_refused_before_any_work(tmp_path: Path) -> None:
    source, store = tiny.write("mixtral", tmp_path / "model"), running.store_in(tmp_path)
    target = checkpoint.checkpoint_of(
        moei2.decompose(calibrated(running.model_in(source), tmp_path), Decomposition(ratio=0.3, ranks="uniform"))
    )
    running.run(store, target)
    out = fetched(store, target, tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    gone = next(n for n in index["weight_map"] if n.endswith("factor_in"))
    del index["weight_map"][gone]
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"holds {gone}, which model.safetensors.index.json does not name"):
        running.model_in(out)


@pytest.mark.slow
@pytest.mark.parametrize("counts", ["uniform", "exact"])
@torch.inference_mode()
def test_pulling_dense_gives_the_same_predictions_from_whole_matrices_and_says_what_it_costs(counts: Any, tmp_path: Path) -> None:
    source, store = tiny.write("olmoe", tmp_path / "model"), running.store_in(tmp_path)
    target = whole(running.model_in(source), tmp_path, ratio=0.3, how=(Counts(0.75, rule=counts), Search("swap")), cut={})
    running.run(store, target)
    out, dense = fetched(store, target, tmp_path / "out"), tmp_path / "dense"
    done = CliRunner().invoke(app, ["pull", target.key, str(dense), "--dense", "--store", str(tmp_path / "store")])
    assert done.exit_code == 0 and "low-rank matrices multiplied out" in done.stdout
    after, before = (bytes_text(sum(t.nbytes for t in headers(Folder(f)).values())) for f in (dense, out))
    assert (
        "no faster than what was never cut" in done.stdout and f"all weights take {after} where they took {before}" in done.stdout
    )
    assert not any(f.low_rank for f in formats(dense).values()) and expert_bytes(dense) > expert_bytes(out)
    config = read_config(Folder(dense))
    assert config["model_type"] == ("olmoe" if counts == "uniform" else "moeflow_olmoe")
    ids = torch.arange(3, 30)[None]
    one, other = (AutoModelForCausalLM.from_pretrained(f).eval()(ids).logits for f in (out, dense))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    again = CliRunner().invoke(
        app, ["pull", target.key, str(tmp_path / "more"), "--dense", "--json", "--store", str(tmp_path / "store")]
    )
    told = json.loads(again.stdout)["dense"]
    assert told["before"] < told["after"] and told["matrices"] > 0


def test_experts_that_stay_whole_are_paid_for_by_the_others_or_the_nearest_ratio_is_told(tmp_path: Path) -> None:
    source, store = tiny.write("mixtral", tmp_path / "model"), running.store_in(tmp_path)
    seen = calibrated(running.model_in(source), tmp_path)
    before = expert_bytes(source)
    for ranks in ("global", "paper"):
        few = checkpoint.checkpoint_of(moei2.decompose(seen, Decomposition(ratio=0.2, least=24, rare="keep", ranks=ranks)))
        running.run(store, few)
        out = fetched(store, few, tmp_path / ranks)
        assert 0 <= 0.8 * before - expert_bytes(out) < 3 * 8 * 3 * (48 + 32) * 4 * (0.2 if ranks == "paper" else 0.05)
        with pytest.raises(StepFailed, match="the nearest"):
            running.run(
                store, checkpoint.checkpoint_of(moei2.decompose(seen, Decomposition(ratio=0.5, least=33, rare="keep", ranks=ranks)))
            )


def test_a_pruned_graph_whose_counts_a_run_decides_is_not_pruned_again(tmp_path: Path) -> None:
    seen = calibrated(running.model_in(tiny.write("mixtral", tmp_path / "model")), tmp_path)
    again = calibrated(moei2.prune(seen, Counts(0.75)), tmp_path)
    with pytest.raises(ValueError, match="is decided by a step of this graph; run it, pull the result and prune that"):
        moei2.prune(again, Counts(0.5))


@torch.inference_mode()
def test_importance_is_what_the_output_the_predictions_or_the_loss_are_without_the_expert(tmp_path: Path) -> None:
    source, store = tiny.write("qwen3_moe", tmp_path / "model"), running.store_in(tmp_path)
    model = running.model_in(source)
    seen = calibrated(model, tmp_path)
    hows = [Counts(0.75, importance=n, measured=128) for n in ("recon", "kl", "lm_loss")]
    steps = [moei2.importance_by(how, seen, model.moe_layers)[2] for how in hows]
    running.run(store, *steps)
    recon, kl, lm = (json.loads(store.artifact(s.key).file("importance.json").read_text()) for s in steps)
    whole_model = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = torch.from_numpy(running.array_of(running.matrix_of(tmp_path)))
    block = whole_model.model.layers[2].mlp
    moe, inputs = read_moe(Tensors(source), read_config(Folder(source)), 2), []
    hook = block.register_forward_hook(lambda _, args, out: inputs.append(args[0].flatten(0, -2)))
    before, log_p = float((out := whole_model(ids, labels=ids)).loss), out.logits[:, :-1].log_softmax(-1)
    hook.remove()
    out_TD = moe(inputs[0])
    for expert in range(8):
        allowed = torch.ones(8, dtype=torch.bool)
        allowed[expert] = False
        changed = float((moe(inputs[0], allowed) - out_TD).norm() / out_TD.norm())
        assert recon["importance"][expert] == pytest.approx(changed, rel=1e-3)
        hook = block.register_forward_hook(lambda _, args, out, a=allowed: moe(args[0].flatten(0, -2), a).view(args[0].shape))
        after, log_q = float((out := whole_model(ids, labels=ids)).loss), out.logits[:, :-1].log_softmax(-1)
        hook.remove()
        apart = float(kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean())
        assert kl["importance"][expert] == pytest.approx(apart, rel=1e-3, abs=1e-7)
        assert lm["importance"][expert] == pytest.approx(max(0.0, after - before), abs=1e-5)
    assert sum(recon["tokens"]) == ids.numel() * 3 and recon["tokens"] == kl["tokens"] == lm["tokens"]
    assert Counts(0.75).importance == Decomposition().importance == "kl"


def test_experts_that_are_left_out_together_share_what_it_did_by_what_each_changes_in_its_layer(tmp_path: Path) -> None:
    store, model = running.store_in(tmp_path), running.model_in(tiny.write("qwen3_moe", tmp_path / "model"))
    seen = calibrated(model, tmp_path)
    hows = [Decomposition(importance=n, measured=128, together=3) for n in ("recon", "kl", "lm_loss")]  # 0+3+6, 1+4+7 and 2+5
    steps = [moei2.importance_by(how, seen, model.moe_layers)[2] for how in hows]
    curves = next(s for s in steps[1].inputs if s.name == "calibrate.curves")
    running.run(store, *steps)
    recon, kl, loss = (json.loads(store.artifact(s.key).file("importance.json").read_text())["importance"] for s in steps)
    measured = json.loads(store.artifact(curves.key).file("curves.json").read_text())
    assert set(measured["curves"]["2"]) == {"0+3+6", "1+4+7", "2+5"}
    for name, apart in measured["curves"]["2"].items():
        together = [int(e) for e in name.split("+")]
        assert sum(kl[e] for e in together) == pytest.approx(apart) != 0
        assert sum(loss[e] for e in together) == pytest.approx(max(0.0, measured["losses"]["2"][name] - measured["loss"]))
        for e in together:
            assert kl[e] == pytest.approx(apart * recon[e] ** 2 / sum(recon[o] ** 2 for o in together))
    spared = moei2.importance_by(Counts(0.75, measured=128, together=100), seen, model.moe_layers)[2]
    running.run(store, spared)  # at least as many stay as a token needs
    assert any(json.loads(store.artifact(spared.key).file("importance.json").read_text())["importance"])
    with pytest.raises(ValueError, match="together=0 must be at least 1"):
        Counts(0.75, together=0)


def test_a_search_that_was_killed_goes_on_to_the_same_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    source = tiny.write("qwen3_moe", tmp_path / "model", num_experts=16)
    seen = calibrated(running.model_in(source), tmp_path)
    how = Search("genetic", population=20, generations=40, best=2)
    pruned = moei2.prune(seen, Counts(0.5, rule="uniform"), how)
    undisturbed = running.store_in(tmp_path / "undisturbed")
    running.run(undisturbed, *pruned.choices)
    store, search, generations = running.store_in(tmp_path / "killed"), genetic.search, []

    def dying(*args: Any, save: Any, resume: Any, **more: Any) -> Any:
        def saved(state: dict[str, Any]) -> None:
            save(state)
            generations.append(state["generation"])
            if len(generations) == 25:
                raise KeyboardInterrupt

        return search(*args, save=saved, resume=resume, **more)

    monkeypatch.setattr(genetic, "search", dying)
    with pytest.raises((KeyboardInterrupt, StepFailed)):
        running.run(store, *pruned.choices)
    running.run(store, *pruned.choices)
    assert generations[25] == 20  # it went on behind the last state that was kept, not from the start
    for choice in pruned.choices:
        one, other = (s.artifact(choice.key).file("choice.json").read_bytes() for s in (undisturbed, store))
        assert one == other


def test_a_second_shard_of_text_adds_up(tmp_path: Path) -> None:
    """Candidates and spectra from two shards are those of one shard with the same tokens."""
    source, store = tiny.write("mixtral", tmp_path / "model"), running.store_in(tmp_path)
    model = running.model_in(source)
    matrix = data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16))
    found = []
    for shard in (4, 8):
        seen = calibrate.run(model, matrix, Pass(batch=2, shard=shard, stage=2))
        pruned = moei2.prune(seen, Counts(0.75, rule="uniform"), Search("enumerate"))
        small = moei2.decompose(seen, Decomposition(ratio=0.3))
        spectra = next(s for s in upstream([small.layers[0]]) if s.name == "decompose.spectra")
        running.run(store, pruned.choices[0], spectra)
        choice = json.loads(store.artifact(pruned.choices[0].key).file("choice.json").read_text())
        found.append((choice, load_file(store.artifact(spectra.key).file("spectra.safetensors"))))
    assert found[0][0]["keep"] == found[1][0]["keep"]
    assert found[0][0]["loss"]["value"] == pytest.approx(found[1][0]["loss"]["value"], rel=1e-5)
    one, two = (spectra for _, spectra in found)
    np.testing.assert_allclose(one["gate_EK"], two["gate_EK"], rtol=1e-4, atol=1e-6 * one["gate_EK"].max())


@pytest.mark.parametrize("rule", ["uniform", "global"])
def test_a_layer_with_many_experts_is_decomposed_by_several_tasks_to_the_same_bytes(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some experts have too few tokens, so that their spectra are scaled by those of experts in other tasks."""
    source = tiny.write("mixtral", tmp_path / "model")
    model = running.model_in(source)
    seen = calibrated(model, tmp_path)
    how = Decomposition(ratio=0.3, ranks=rule, least=30)
    made: dict[int, bytes] = {}
    for at_once in (64, 3):
        monkeypatch.setattr(decompose, "PER_TASK", at_once)
        store = Store.open(str(tmp_path / f"store-{at_once}"))
        layer = moei2.decompose(seen, how).layers[1]
        running.run(store, layer)
        tasks = [s for s in upstream([layer]) if s.name == "decompose.layer" and s.params["layer"] == 1 and "uniform" in s.params]
        assert {s.params["task"][1] for s in tasks} == {1 if at_once == 64 else 3}
        tensors, facts = store.artifact(layer.key).file("layer.safetensors"), store.artifact(layer.key).file("facts.json")
        made[at_once] = tensors.read_bytes() + facts.read_bytes()
    assert made[64] == made[3]
