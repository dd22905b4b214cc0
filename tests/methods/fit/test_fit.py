"""Models that are fitted into a budget, whole: they take no more, load, and are as far from the original as was said."""

import json
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moeflow.cli import app
from moeflow.engines import ENGINES
from moeflow.methods.calibrate import forking
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.finetune.recipe import Gang, Recipe
from moeflow.methods.fit.choosing import RANKED, nearest
from moeflow.methods.fit.options import Budget, Offers
from moeflow.methods.fit.reach import NEARLY
from moeflow.methods.fit.sizes import expected, size
from moeflow.methods.graph import Calibration, Model, Pass, Sample
from moeflow.methods.recipes import fit, tune
from moeflow.methods.recipes import fitted as fitted_pipeline
from moeflow.methods.recipes.tune import FineTuning, Recovering, Tuned
from moeflow.methods.records import Curves
from moeflow.model.spec import LayerSpec
from moeflow.report.layers import read
from moeflow.run import pipeline
from moeflow.sources import Texts
from moeflow.step import Step, step_of, upstream
from moeflow.store import Store
from tests import kinds, layouts, running, tiny

OFFERS: dict[str, Any] = {"counts": (0.75,), "ranks": (0.3,), "bits": (4,), "group": 8, "measured": 128}


def calibrated(model: Path, folder: Path) -> Calibration:
    original = running.model_in(model)
    matrix = data.tokens(running.matrix_of(folder), original, Sample(8, 16))
    return fit.calibrated(original, matrix, Pass(batch=2, shard=4, stage=2))


def fitted(calibration: Calibration, budget: Budget, **offers: Any) -> Step:
    made = fit.compress(calibration, budget, Offers(**OFFERS | offers))
    return checkpoint.checkpoint_of(made.model).reporting(*made.reports)


def decision(store: Store, target: Step) -> dict[str, Any]:
    (report,) = target.reports
    (chosen,) = report.inputs
    return dict(json.loads(store.artifact(chosen.key).file("fit.json").read_text()))


def weights(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


@torch.inference_mode()
def test_a_fitted_model_takes_no_more_than_its_budget_and_is_as_far_as_was_measured(family: Path, tmp_path: Path) -> None:
    store, calibration = running.store_in(tmp_path), calibrated(family, tmp_path)
    half, three_quarters = (fitted(calibration, Budget(ratio=ratio)) for ratio in (0.5, 0.25))
    steps = {s.name for s in running.run(store, half).steps if s.state == "run"}
    assert "slim.decided" in steps, "what was chosen is quantized in sequence, too"
    out = tmp_path / "half"
    store.fetch(half.key, out)
    said = decision(store, half)
    assert weights(out) == said["size"] <= said["budget"] < 0.51 * said["whole"]
    rows = {
        row.get("figure"): row for row in json.loads(store.artifact(half.reports[0].key).file("report.json").read_text())["rows"]
    }
    assert rows["budget"]["compressed"] == said["budget"] and rows["measured_kl"]["compressed"] == said["before"]
    ids = torch.from_numpy(running.array_of(running.matrix_of(tmp_path)))
    log_p, log_q = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval()(ids).logits[:, :-1].log_softmax(-1)
        for p in (family, out)
    )
    apart = kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    assert said["before"] == pytest.approx(float(apart), rel=1e-3, abs=1e-7)

    other = running.run(store, three_quarters)
    again = {s.name for s in other.steps if s.state == "run"}
    assert not again & {"slim.layer", "decompose.layer", "prune.candidates"}, "no alternative is made again"
    assert decision(store, three_quarters)["before"] <= said["before"]


def test_quantizing_in_sequence_goes_by_small_shards_and_is_measured_on_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration, store = calibrated(tiny.write("mixtral", tmp_path / "model"), tmp_path), running.store_in(tmp_path)
    measure, given = calibrate.curves, list[dict[str, Any]]()

    def curves(*of: Any, **how: Any) -> Step:
        given.append({"of": of} | how)
        return measure(*of, **how)

    monkeypatch.setattr(calibrate, "curves", curves)
    fitted(calibration, Budget(ratio=0.25), measured=48)
    monkeypatch.setattr(fit, "SHARD", 33)
    fitted(calibration, Budget(ratio=0.25), measured=48)
    plain, small = (call for call in given if call.get("ends"))
    assert [len(call["ends"]) for call in (plain, small)] == [2, 4], "of 4 sequences, and of 2 of 16 tokens"
    of, ends = small.pop("of"), small.pop("ends")
    known, anew = (measure(*of, **small, ends=way) for way in (ends, ()))
    running.run(store, known, anew)
    one, other = (Curves.read(store.artifact(s.key)) for s in (known, anew))
    assert known.key != anew.key and one.tokens == other.tokens == 60 and one.apart > 0
    assert one.apart == pytest.approx(other.apart, rel=1e-4)
    assert one.apart_of_sequences == pytest.approx(other.apart_of_sequences, rel=1e-3)


def test_experts_ranks_and_bits_go_together_where_all_is_offered(small_offer: Calibration, tmp_path: Path) -> None:
    store, ids = running.store_in(tmp_path), torch.from_numpy(running.array_of(running.matrix_of(tmp_path)))
    easy = fitted(small_offer, Budget(ratio=0.3), gone=False, rounds=1, grid="all")
    running.run(store, easy)
    said = decision(store, easy)
    together = ("6 experts, 0.3 off", "6 experts, 0.3 off, 4 bits")
    pairs = {"8 experts", "6 experts", "8 experts, 0.3 off", "8 experts, 4 bits", "6 experts, 4 bits", "8 experts, 0.3 off, 4 bits"}
    sizes = {name: size for name, (size, _) in said["table"]["0"].items()}
    assert {*sizes} == pairs | {*together} and sizes[together[1]] == min(sizes.values())
    least = said["size"] + sum(of_layer[together[1]][0] - of_layer[said["chosen"][i]][0] for i, of_layer in said["table"].items())
    budget = Budget(bytes=str(int(least)))
    with pytest.raises(ValueError, match="cannot be met: what is offered takes"):
        fitted(small_offer, budget, gone=False, rounds=1)
    tight = fitted(small_offer, budget, gone=False, rounds=1, grid="all")
    running.run(store, tight)
    assert {*decision(store, tight)["chosen"].values()} == {together[1]}
    store.fetch(tight.key, out := tmp_path / "out")
    assert weights(out) <= least
    with torch.inference_mode():
        log_p, log_q = (AutoModelForCausalLM.from_pretrained(f)(ids).logits.log_softmax(-1) for f in (tmp_path / "model", out))
    apart = kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)[:, :-1].mean()
    assert decision(store, tight)["before"] == pytest.approx(float(apart), rel=1e-3)


def test_few_bits_are_offered_with_scales_for_twice_as_many_weights(small_offer: Calibration, tmp_path: Path) -> None:
    store = running.store_in(tmp_path)
    only: dict[str, Any] = {"counts": (), "ranks": (), "bits": (4, 2), "gone": False, "rounds": 1}
    easy = fitted(small_offer, Budget(ratio=0.3), **only)
    running.run(store, easy)
    said = decision(store, easy)
    assert {*said["table"]["0"]} == {"8 experts", "8 experts, 4 bits", "8 experts, 2 bits", "8 experts, 2 bits, groups of 16"}
    least = said["size"] + sum(
        min(size for size, _ in of_layer.values()) - of_layer[said["chosen"][i]][0] for i, of_layer in said["table"].items()
    )
    tight = fitted(small_offer, Budget(bytes=str(int(least))), **only)
    running.run(store, tight)
    assert {*decision(store, tight)["chosen"].values()} == {"8 experts, 2 bits, groups of 16"}
    store.fetch(tight.key, tmp_path / "out")
    tensors = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    scaled = {t.shape[1] for n, t in tensors.items() if n.endswith("w1.weight_scale")}
    assert scaled == {small_offer.model.config["hidden_size"] // 16}, "made again in sequence, in the same groups"
    assert weights(tmp_path / "out") <= least
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(8)[None]).logits.isfinite().all()


def test_wide_groups_are_those_of_the_engine() -> None:
    assert Offers(group=32, wide=(2,)).groups(2) == (32, 64) and Offers(group=32, wide=(2,)).groups(3) == (32,)
    assert Offers(engine="vllm", group=64, bits=(4,), wide=(4,)).groups(4) == (64, 128)
    assert Offers(engine="vllm", group=128, bits=(4,), wide=(4,)).groups(4) == (128,), "it has no kernel for 256"


@pytest.mark.slow
def test_around_a_choice_only_the_most_promising_are_measured(small_offer: Calibration, tmp_path: Path) -> None:
    """At a third of the bytes the layers as they are are none of them."""
    store = running.store_in(tmp_path)
    target = fitted(small_offer, Budget(ratio=0.67), counts=(0.875, 0.75, 0.625, 0.5), ranks=(), bits=(8, 4))
    running.run(store, target)
    said = decision(store, target)
    assert said["size"] <= said["budget"] < 0.34 * said["whole"]
    first, second = sorted((s for s in upstream([target]) if s.name == "fit.decide"), key=lambda s: len(upstream([s])))
    made = [json.loads(store.artifact(s.key).file("fit.json").read_text()) for s in (first, second)]
    tables = [each["table"] for each in made]
    assert {len(t) for t in tables[0].values()} == {16} and {len(t) for t in tables[1].values()} == {12}
    assert not any("8 experts" in t for t in tables[1].values())
    for each in made:  # what a layer costs alone was measured around the original, and is more than nothing
        assert each["alone"] == {i: tables[0][i][name][1] for i, name in each["chosen"].items()}
        assert all(cost > 0 for cost in each["alone"].values())
    page = read(store.artifact(target.key))
    assert page is not None and [i.divergence for i in page.layers] == [*said["alone"].values()]


@pytest.mark.slow
@pytest.mark.parametrize("unit, budget", [("operations", Budget(speed=1.1)), ("resident", Budget(ratio=0.2))])
def test_budgets_of_other_units_are_kept(small_offer: Calibration, tmp_path: Path, unit: str, budget: Budget) -> None:
    store = running.store_in(tmp_path)
    if unit == "resident":
        whole = sum(layer.spec.output.nbytes for layer in small_offer.model.layers) + small_offer.model.rest.spec.output.nbytes
        budget = Budget(resident=str(int(0.9 * whole)))
    target = fitted(small_offer, budget, rounds=1)
    running.run(store, target)
    said = decision(store, target)
    assert said["unit"] == unit and said["size"] <= said["budget"] < said["whole"]


def test_resident_bytes_are_those_of_the_loaded_model(small_offer: Calibration, tmp_path: Path) -> None:
    """Unpacked, and with ranks padded as they are in memory."""
    store = running.store_in(tmp_path)
    whole = sum(layer.spec.output.nbytes for layer in small_offer.model.layers) + small_offer.model.rest.spec.output.nbytes
    target = fitted(small_offer, Budget(resident=str(int(0.9 * whole))), rounds=1, counts=(), bits=(), gone=False)
    running.run(store, target)
    store.fetch(target.key, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert "0.3 off" in "".join(decision(store, target)["chosen"].values())
    assert sum(p.nbytes for p in model.parameters()) == pytest.approx(decision(store, target)["size"], rel=0.03)


def test_what_a_family_cannot_have_is_told(tmp_path: Path) -> None:
    """Ranks that cannot be packed: the plan says why."""
    calibration = calibrated(tiny.write("mixtral", tmp_path / "model"), tmp_path)
    offers = Offers(**OFFERS | {"ranks": (0.3, 0.5, 0.7), "bits": (3,)})
    (report,) = fit.compress(calibration, Budget(ratio=0.2), offers).reports
    (note,) = [note for note in report.notes if "ratio=" in note]
    assert note.startswith("8 experts, 0.3 off, 3 bits not on offer: ratio=0.3 cannot be had") and "; nor, for the like, " in note


@pytest.mark.parametrize(
    ("group", "engine", "taken"),
    [
        (7, "moeflow", "one scale a row is"),
        (12, "moeflow", "groups of 8 are"),
        (32, "vllm", "one scale a row is"),
        (8, "moeflow", ""),
    ],
)
def test_groups_that_divide_no_row_are_replaced(group: int, engine: str, taken: str, tmp_path: Path) -> None:
    calibration = calibrated(tiny.write("mixtral", tmp_path / "model"), tmp_path)
    made = fit.compress(calibration, Budget(ratio=0.2), Offers(**OFFERS | {"group": group, "engine": engine}))
    (report,) = made.reports
    assert taken in "".join(note for note in report.notes if note.startswith(f"groups of {group} not on offer: "))
    slimmed = [s for s in upstream([checkpoint.checkpoint_of(made.model)]) if s.name == "slim.layer"]
    wanted = 0 if "row" in taken else 8
    assert slimmed and all(s.spec.output.packed.group == wanted for s in slimmed)


def test_a_model_packed_with_a_scale_a_row_takes_no_more_than_its_budget_and_loads(tmp_path: Path) -> None:
    model = tiny.write("mixtral", tmp_path / "model")
    store, target = running.store_in(tmp_path), fitted(calibrated(model, tmp_path), Budget(ratio=0.4), group=0, ranks=(), counts=())
    running.run(store, target)
    out, said = tmp_path / "out", decision(store, target)
    store.fetch(target.key, out)
    assert weights(out) == said["size"] <= said["budget"] and any("4 bits" in name for name in said["chosen"].values())
    ids = torch.from_numpy(running.array_of(running.matrix_of(tmp_path)))
    log_p, log_q = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval()(ids).logits[:, :-1].log_softmax(-1).detach()
        for p in (model, out)
    )
    apart = kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    assert said["before"] == pytest.approx(float(apart), rel=1e-3, abs=1e-7)


def test_the_command_plans_and_asks_for_one_budget(tmp_path: Path) -> None:
    tiny.write("mixtral", tmp_path / "model")
    words = ["fit", str(tmp_path / "model"), "--plan", "--store", str(tmp_path / "store"), "-p", "offers.group=8"]
    words += ["-p", "offers.counts=[0.75]", "-p", "calibration.sequences=8", "-p", "calibration.length=16", "-p", "heldout="]
    words += ["-p", f"tokens={running.matrix_of(tmp_path).spec}"]
    none = CliRunner().invoke(app, words)
    assert none.exit_code == 2 and "give one budget: --bytes 24GB" in none.output
    planned = CliRunner().invoke(app, [*words, "--ratio", "0.3"])
    assert planned.exit_code == 0, planned.output
    assert "fit.decide" in planned.output and "a budget in bytes can be from" in planned.output
    assert "finetune.train" not in planned.output and "fits into this budget" not in planned.output
    larger = CliRunner().invoke(app, [*words, "--bytes", "1GB"])
    assert larger.exit_code == 0 and "the model fits into this budget as it is" in larger.output
    recovered = CliRunner().invoke(app, [*words, "--ratio", "0.3", "--recover", "-p", "recover.batch=4", "-p", "gang.gpus=0"])
    assert recovered.exit_code == 0, recovered.output
    assert "finetune.train" in recovered.output
    both = CliRunner().invoke(app, [*words, "--ratio", "0.3", "--frontier"])
    assert both.exit_code == 2 and "take one of them" in both.output
    refused = CliRunner().invoke(app, [*words, "--bytes", "1KB"])
    assert refused.exit_code == 2 and "a budget of 1000 bytes cannot be met" in refused.output


def test_a_fit_says_its_engine_in_its_recipe(tmp_path: Path) -> None:
    tiny.write("mixtral", tmp_path / "model")
    store = str(tmp_path / "store")
    words = ["fit", str(tmp_path / "model"), "--ratio", "0.1", "--engine", "vllm", "--ep", "3", "--store", store]
    words += ["-p", "offers.counts=[0.75]", "-p", "offers.bits=[]", "-p", "offers.rounds=1", "-p", "calibration.sequences=8"]
    words += ["-p", "calibration.length=16", "-p", "heldout=", "-p", f"tokens={running.matrix_of(tmp_path).spec}"]
    made = CliRunner().invoke(app, words)
    assert made.exit_code == 0, made.output
    pulled = CliRunner().invoke(app, ["pull", "fit@1", str(tmp_path / "out"), "--store", store, "--engine", "vllm,ep=3"])
    assert pulled.exit_code == 0, pulled.output
    assert "engine: vllm,ep=3" in (tmp_path / "out" / "recipe.yaml").read_text()


@pytest.mark.slow
def test_a_frontier_is_shown_once_a_fit_has_measured_it(tmp_path: Path) -> None:
    tiny.write("mixtral", tmp_path / "model")
    words = ["fit", str(tmp_path / "model"), "--store", str(tmp_path / "store"), "-p", "offers.group=8"]
    words += ["-p", "offers.counts=[0.75]"]
    words += ["-p", "offers.ranks=[]", "-p", "offers.bits=[4]", "-p", "calibration.sequences=8", "-p", "calibration.length=16"]
    words += ["-p", "heldout=", "-p", f"tokens={running.matrix_of(tmp_path).spec}", "-p", "offers.rounds=1"]
    none = CliRunner().invoke(app, [*words, "--frontier"])
    assert none.exit_code == 2 and "has no curves of this model with these options; run moeflow fit" in none.output
    assert CliRunner().invoke(app, [*words, "--ratio", "0.3"]).exit_code == 0
    shown = CliRunner().invoke(app, [*words, "--frontier"])
    assert shown.exit_code == 0, shown.output
    assert "predicted KL at" in shown.output and "NAEE, 6 experts everywhere" in shown.output
    assert "GPTQ, as expert slimming, 8 experts, 4 bits everywhere" in shown.output


@pytest.fixture
def small_offer(tmp_path: Path) -> Calibration:
    return calibrated(tiny.write("mixtral", tmp_path / "model"), tmp_path)


def test_transformers_alone_gets_what_it_loads(small_offer: Calibration, tmp_path: Path) -> None:
    store, target = running.store_in(tmp_path), fitted(small_offer, Budget(ratio=0.2), engine="transformers", bits=(), rounds=1)
    running.run(store, target)
    out = tmp_path / "out"
    store.fetch(target.key, out)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "mixtral" and config["num_local_experts"] == 6
    assert set(decision(store, target)["chosen"].values()) == {"6 experts"}


def test_models_of_one_kind_are_measured_whole_and_the_nearest_is_taken(tmp_path: Path) -> None:
    """Of an engine that runs layers of one kind only, no layer alone can be another one around the choice."""
    model = tiny.write("mixtral", tmp_path / "model")
    target = fitted(calibrated(model, tmp_path), Budget(ratio=0.2), engine="transformers", counts=(0.75,), bits=(8, 4))
    store, steps = running.store_in(tmp_path), {s.name: s for s in upstream([target, *target.reports])}
    running.run(store, target)
    better = steps["fit.better"]
    choices, measured = better.inputs[: len(better.inputs) // 2], better.inputs[len(better.inputs) // 2 :]
    names = [set(json.loads(store.artifact(c.key).file("fit.json").read_text())["chosen"].values()) for c in choices]
    assert len(names) == RANKED and all(len(n) == 1 for n in names) and len(set().union(*names)) == RANKED
    apart = [Curves.read(store.artifact(m.key)).apart for m in measured]
    best = json.loads(store.artifact(better.key).file("fit.json").read_text())
    assert best["before"] == min(apart) and set(best["chosen"].values()) == names[apart.index(min(apart))]
    out = tmp_path / "out"
    store.fetch(target.key, out)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "mixtral" and weights(out) <= decision(store, target)["budget"]


@pytest.mark.parametrize("kind", ["fused", "transposed", "top-1", "corrected"])
def test_an_engine_is_offered_what_it_loads_of_any_family(kind: str, tmp_path: Path) -> None:
    """A family with experts in stacks alone is packed in moeflow's own format, which these engines do not load."""
    calibration = calibrated(kinds.write(kind, tmp_path / "model"), tmp_path)
    for engine in ("transformers", "vllm", "llama.cpp"):
        made = fitted(calibration, Budget(ratio=0.05), engine=engine, counts=(0.5, 0.75), bits=(8,), group=32)
        assert not made.spec.output.form.why_not(ENGINES[engine])
        packed = any(s.name == "slim.layer" for s in upstream([made]))
        told = any("stacks, which hold no packed ones" in note for report in made.reports for note in report.notes)
        assert (packed, told) == ((engine != "llama.cpp", False) if kind == "corrected" else (False, True))


def test_a_model_in_mxfp4_is_fitted_for_an_engine_with_one_number_of_experts(tmp_path: Path) -> None:
    calibration = calibrated(kinds.write("mxfp4", tmp_path / "model"), tmp_path)
    with pytest.raises(ValueError, match="layer 0 is in MXFP4.*: fit for --engine transformers"):
        fitted(calibration, Budget(ratio=0.1))
    assert fitted(calibration, Budget(ratio=0.1), engine="transformers", counts=(0.5, 0.75))


def test_a_budget_out_of_reach_is_told_before_anything_runs(small_offer: Calibration) -> None:
    with pytest.raises(ValueError, match=r"a budget of 100 bytes cannot be met: what is offered takes [0-9.]+ KiB at the least"):
        fitted(small_offer, Budget(bytes="100"))
    whole = sum(layer.spec.output.nbytes for layer in small_offer.model.layers)
    with pytest.raises(ValueError, match=rf"of {whole >> 10} bytes cannot be met: .*; did you mean {whole >> 10}KiB\?$"):
        fitted(small_offer, Budget(bytes=str(whole >> 10)))


def test_an_engine_that_runs_nothing_of_the_offer_is_told(small_offer: Calibration) -> None:
    with pytest.raises(ValueError, match="nothing that a layer could become for engine=transformers: it runs"):
        fitted(small_offer, Budget(ratio=0.2), engine="transformers", counts=(), bits=(3,))


def test_what_an_engine_does_not_run_is_told(small_offer: Calibration) -> None:
    made = fit.compress(small_offer, Budget(ratio=0.05), Offers(**OFFERS | {"engine": "transformers", "bits": (4, 3)}))
    told = " ".join(made.reports[0].notes)
    assert "lower ranks not on offer: transformers does not run it (" in told
    assert "3 bits not on offer: transformers does not run it (" in told and "a layer without its MoE block" in told


@pytest.mark.parametrize(
    "budget, why",
    [
        (Budget(speed=100), r"100 times fewer operations a token cannot be had: what is offered takes up to 1\.[0-9]+ times fewer"),
        (Budget(resident="1KiB"), r"a budget of 1\.0 KiB in memory cannot be met: what is offered takes [0-9.]+ KiB at the least"),
    ],
    ids=["speed", "resident"],
)
def test_budgets_of_other_units_out_of_reach_are_told_before_anything_runs(
    budget: Budget, why: str, small_offer: Calibration
) -> None:
    with pytest.raises(ValueError, match=why):
        fitted(small_offer, budget, gone=False)


@pytest.mark.parametrize("unit", ["bytes", "resident", "operations"])
def test_what_is_expected_of_alternatives_is_what_they_take(unit: str, small_offer: Calibration, tmp_path: Path) -> None:
    """But for what the run decides: ranks, and their padding."""
    store, runs, config = running.store_in(tmp_path), ENGINES["moeflow"], small_offer.model.config
    target = fitted(small_offer, Budget(ratio=0.3), rounds=1)
    running.run(store, target)
    (decide,) = (s for s in upstream([target]) if s.name == "fit.decide")
    inputs = [step_of(i) for i in decide.inputs]
    layers = [s for s in inputs if isinstance(s.spec.output, LayerSpec) and not s.spec.output.elsewhere]
    assert len(layers) > 8
    for each in layers:
        taken = size(store.artifact(each.key), unit, runs, config, each.spec.output.layer)
        assert 0.8 < expected(each.spec.output, unit, runs) / taken < 1 / NEARLY[unit], "what could be had would be refused"


def test_a_model_keeps_experts_where_the_budget_would_leave_none(small_offer: Calibration, tmp_path: Path) -> None:
    """The least is one layer's smallest; what is a little more was predicted to be best without any."""
    store = running.store_in(tmp_path)
    whole = sum(layer.spec.output.nbytes for layer in small_offer.model.layers)
    with pytest.raises(ValueError, match=r"cannot be met: what is offered takes (.*) at the least") as told:
        fitted(small_offer, Budget(bytes=str(whole // 100)))
    number, unit = str(told.value).partition("takes ")[2].split()[:2]
    target = fitted(small_offer, Budget(bytes=f"{1.01 * float(number):.3f}{unit}"))
    running.run(store, target)
    said = decision(store, target)
    assert sorted(said["chosen"].values())[:2] != ["gone", "gone"] and "gone" in said["chosen"].values()
    assert said["size"] <= said["budget"]


def test_a_budget_counts_only_what_is_written(tmp_path: Path) -> None:
    """Of a multimodal model whose layers differ the text model alone is."""
    folder = layouts.write("qwen3_5_moe", tmp_path / "model")
    store, calibration = running.store_in(tmp_path), calibrated(folder, tmp_path)
    target = fitted(calibration, Budget(ratio=0.3), rounds=1)
    running.run(store, target)
    out = tmp_path / "out"
    store.fetch(target.key, out)
    said = decision(store, target)
    assert weights(out) == said["size"] <= said["budget"]
    assert not any("visual" in name for file in out.glob("*.safetensors") for name in load_file(file))


def test_a_single_sequence_is_told_to_say_nothing_of_others(tmp_path: Path) -> None:
    original = running.model_in(tiny.write("mixtral", tmp_path / "model"))
    matrix = data.tokens(running.matrix_of(tmp_path, sequences=1, length=2), original, Sample(1, 2))
    made = fitted(fit.calibrated(original, matrix, Pass(batch=1, shard=1, stage=2)), Budget(ratio=0.4), rounds=1, ranks=())
    summary = running.run(running.store_in(tmp_path), made)
    assert any("tokens of one sequence, which says nothing of others" in note for s in summary.steps for note in s.notes)


def test_an_alternative_that_breaks_the_model_is_left_out(
    small_offer: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a word of it; and a choice that does is not taken."""
    measured, broken = forking.measured, "8 experts, 4 bits"

    def one_broken(*args: Any, **options: Any) -> Curves:
        curves = measured(*args, **options)
        return replace(curves, curves={i: {n: nan if n == broken else c for n, c in of.items()} for i, of in curves.curves.items()})

    monkeypatch.setattr(forking, "measured", one_broken)
    store, target = running.store_in(tmp_path), fitted(small_offer, Budget(ratio=0.4), rounds=1)
    summary = running.run(store, target)
    said = decision(store, target)
    assert broken not in said["chosen"].values() and said["size"] <= said["budget"]
    told = [note for s in summary.steps for note in s.notes]
    assert any(f"is left without {broken}: with that the model predicts what is no number" in note for note in told)


def test_of_models_the_nearest_is_one_that_predicts_numbers() -> None:
    assert nearest([nan, 0.2, 0.1, inf]) == 2
    with pytest.raises(ValueError, match="predict what is no number; measure in another precision"):
        nearest([nan, inf])


def test_recovering_trains_on_sequences_as_long_as_the_calibration(tmp_path: Path) -> None:
    tiny.write("mixtral", tmp_path / "model")
    words = [f"model={tmp_path / 'model'}", f"tokens={running.matrix_of(tmp_path).spec}", "heldout=", "budget.ratio=0.3"]
    words += ["offers.group=8", "calibration.length=16", "recover.batch=4", "gang.gpus=0"]
    target = pipeline.call(fitted_pipeline.build, words)
    (train,) = (s for s in upstream([target]) if s.name == "finetune.train")
    assert step_of(train.inputs[1]).spec.output.length == 16 != FineTuning().length


def divergence(store: Store, target: Step) -> float:
    """As the choice says that it was measured."""
    return float(decision(store, target)["before"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "bits, part, packed", [((4,), 0.7, "beside"), ((4,), 0.7, "scales"), ((4,), 0.7, "codes"), ((), 0.35, "codes")]
)
def test_a_recovered_model_is_closer_and_takes_no_more(
    small_offer: Calibration, tmp_path: Path, bits: tuple[int, ...], part: float, packed: Any
) -> None:
    """Fine-tuned towards the original: merged, or kept beside packed weights; what a training made worse would be left."""
    store, model, rows = running.store_in(tmp_path), small_offer.model, small_offer.tokens
    how = Recipe(loss="kl", steps=16, batch=8, rate=3e-3, dtype="float32", packed=packed)

    others = running.matrix_of(tmp_path, seed=1)
    unseen = data.tokens(others, model, Sample(8, 16))

    def recovered(plain: Model) -> Tuned:
        tuned = tune.tune(plain, rows, how, teacher=model, passed=small_offer.passed, gang=Gang(gpus=0))
        return replace(tuned, unseen=unseen)

    offers = Offers(**OFFERS | {"bits": bits, "ranks": (), "counts": (0.5,), "rounds": 1})
    targets = []
    for recover in (None, recovered):
        made = fit.compress(small_offer, Budget(ratio=part), offers, recover)
        targets.append(checkpoint.checkpoint_of(made.model).reporting(made.reports[0]))
        running.run(store, targets[-1])
    before, after = (divergence(store, target) for target in targets)
    assert after < 0.9 * before
    taken, *other = sorted(decision(store, targets[1])["tried"].items(), key=lambda way: way[1])
    assert decision(store, targets[1])["recovered"] == taken[0] or decision(store, targets[1])["over"]
    assert bool(other) == (packed == "beside"), "beside packed weights it is kept or merged"
    store.fetch(targets[1].key, tmp_path / "out")
    assert weights(tmp_path / "out") <= decision(store, targets[1])["budget"]
    other_of = decision(store, targets[1])["unseen"]
    assert set(other_of) == {"", *decision(store, targets[1])["tried"]}
    for matrix, says in ((running.matrix_of(tmp_path), after), (others, other_of[decision(store, targets[1])["recovered"]])):
        ids = torch.from_numpy(running.array_of(matrix))
        with torch.inference_mode():
            log_p, log_q = (
                AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval()(ids).logits[:, :-1].log_softmax(-1)
                for p in (tmp_path / "model", tmp_path / "out")
            )
        assert float(kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()) == pytest.approx(says, rel=1e-3)


def test_held_out_text_is_never_trained_on(tmp_path: Path) -> None:
    how = Recovering()
    for name in ("one.txt", "copy.txt"):
        (tmp_path / name).write_text("the same words")
    with pytest.raises(ValueError, match=r"heldout.texts names .*copy.txt, which is trained on"):
        how.on(Texts(f"{tmp_path}/one.txt"), f"{tmp_path}/copy.txt")
    assert how.on(Texts("python:stdlib/a*.py"), "python:stdlib/t*.py").text == "python:stdlib/a*.py"
    with pytest.raises(ValueError, match=r"heldout.texts names python:stdlib/a\*.py, which is trained on"):
        how.on(Texts("python:stdlib/a*.py*2,python:stdlib/b*.py"), "python:stdlib/t*.py,python:stdlib/a*.py")
