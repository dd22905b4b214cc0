"""Multi-token-prediction layers beside a pruned model, against transformers' own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Calibration, Model, Pass, Sample
from moeflow.methods.predict.steps import predicted
from moeflow.methods.prune.counts import Counts
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import moei2, naee, unified
from moeflow.methods.trim.steps import Trimming
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import experts_in
from moeflow.step import Step
from moeflow.store import Store
from tests import predicting, running
from tests.predicting import Predictions

FAMILIES = list(predicting.MODELS)
SHORT = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
PASSED = Pass(batch=4, shard=4, stage=64)


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return predicting.write(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three decoder layers, two of them with experts, and a prediction layer."""
    return predicting.write("deepseek_v3", tmp_path_factory.mktemp("short") / "model", **SHORT)


def calibrated(source: Path, folder: Path, **options: Any) -> Calibration:
    model = running.model_in(source, **options)
    return calibrate.run(model, data.tokens(running.matrix_of(folder), model, Sample(8, 16)), PASSED)


def written(model: Model, folder: Path) -> tuple[Path, Store]:
    """The checkpoint of a model, and the store in which it was made."""
    store, target = running.store_in(folder), checkpoint.checkpoint_of(model)
    running.run(store, target)
    store.fetch(target.key, folder / "out")
    return folder / "out", store


def chosen(store: Store, made: Step) -> list[int]:
    keep: list[int] = json.loads(store.artifact(made.key).file("choice.json").read_text())["keep"]
    return keep


def recorded(calibration: Calibration, store: Store) -> dict[int, list[dict[str, Tensor]]]:
    running.run(store, *(part.step for parts in calibration.predicted.values() for part in parts))
    return {
        i: [load_file(store.artifact(part.step.key).file(f"layer-{i:03d}.safetensors")) for part in parts]
        for i, parts in calibration.predicted.items()
    }


@pytest.mark.parametrize("layers", [1, 2])
def test_a_prediction_layer_records_what_it_gets_in_transformers(layers: int, tmp_path: Path) -> None:
    source = predicting.write("glm4_moe", tmp_path / "model", layers=layers, **SHORT)
    seen = recorded(predicted(calibrated(source, tmp_path, mtp="prune")), running.store_in(tmp_path))
    ids_NL = torch.from_numpy(running.array_of(running.matrix_of(tmp_path)))
    theirs = Predictions(source)
    with theirs.inputs() as inputs:
        theirs.behind(theirs.states(ids_NL), ids_NL)
    assert list(seen) == [3 + at for at in range(layers)] and len(inputs) == layers
    for shards, x_TD in zip(seen.values(), inputs, strict=True):
        torch.testing.assert_close(torch.cat([s["x_RD"] for s in shards]), x_TD, rtol=1e-4, atol=1e-5)
        assert sum(int(s["count_E"].sum()) for s in shards) == 2 * len(x_TD)


@torch.inference_mode()
def test_a_pruned_prediction_layer_is_the_original_with_those_experts_masked_and_drafts(source: Path, tmp_path: Path) -> None:
    pruned = naee.prune(calibrated(source, tmp_path, mtp="prune"), 6)
    out, store = written(pruned, tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert (config["n_routed_experts"], config["num_nextn_predict_layers"]) == (6, 1)
    before, after = Predictions(source), Predictions(out)
    ids_NL = torch.randint(3, 96, (1, 20), generator=torch.Generator().manual_seed(3))
    states_NLD = before.states(ids_NL)
    (whole,) = before.behind(states_NLD, ids_NL)
    before.mask(0, chosen(store, pruned.choices[-1]))
    (masked,), (sliced,) = before.behind(states_NLD, ids_NL), after.behind(states_NLD, ids_NL)
    assert not torch.allclose(masked, whole, atol=1e-3)
    torch.testing.assert_close(sliced, masked, rtol=1e-4, atol=1e-5)
    alone = after.model.generate(ids_NL, max_new_tokens=8, do_sample=False)
    assert torch.equal(after.model.generate(ids_NL, max_new_tokens=8, do_sample=False, use_mtp=True), alone)


@pytest.mark.parametrize("method", ["progressive", "swap", "reap"])
def test_a_prediction_layer_is_pruned_by_the_method_of_the_others(method: str, short: Path, tmp_path: Path) -> None:
    pruned = naee.prune(calibrated(short, tmp_path, mtp="prune"), 6, Search(method))
    store = running.store_in(tmp_path)
    running.run(store, *pruned.extra, *pruned.choices)
    record = json.loads(store.artifact(pruned.choices[-1].key).file("choice.json").read_text())
    assert (record["layer"], len(record["keep"]), record["experts"]) == (3, 6, 8)
    assert record["criterion"] == ("enumerate" if method == "progressive" else method)
    assert record["loss"] is None if method == "reap" else record["loss"]["tokens"] == 8 * 15
    table = load_file(store.artifact(pruned.extra[0].key).file("layer.safetensors"))
    assert sum(".experts." in n for n in table) == 6 * 3 and len(table["model.layers.3.mlp.gate.weight"]) == 6


COUNTS = {
    "uniform": lambda c: moei2.prune(c, Counts(0.75, rule="uniform"), Search("swap")),
    "exact": lambda c: moei2.prune(c, Counts(11, rule="exact", measured=32), Search("swap")),
    "paper": lambda c: moei2.prune(c, Counts(13, rule="paper", importance="recon"), Search("genetic", population=8, generations=2)),
    "span": lambda c: moei2.prune(c, Counts(0.75, rule="uniform"), Search("swap", span=2)),
    "trimmed": lambda c: unified.compress(c.model, c.tokens, c.passed, order="trim", trim=Trimming("experts", 2.5)).model,
    "trimmed by layer": lambda c: (
        unified.compress(c.model, c.tokens, c.passed, order="trim", trim=Trimming("experts", 2, across="layer")).model
    ),
}
"""What decides how many experts each of two layers keeps, before or in the run."""
FAST = ("exact", "trimmed")
SLOW = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in COUNTS]


@pytest.mark.parametrize("rule", SLOW)
def test_a_prediction_layer_keeps_as_many_as_the_layer_that_keeps_most_and_loads(rule: str, short: Path, tmp_path: Path) -> None:
    out, _ = written(COUNTS[rule](calibrated(short, tmp_path, mtp="prune")), tmp_path)
    config = json.loads((out / "config.json").read_text())
    own = [layer["experts"] for layer in config.get("moeflow_layers", ()) if layer] or [6, 6]
    assert config["n_routed_experts"] == max(own) < 8
    tensors = Tensors(out)
    assert [experts_in(tensors, config, i) for i in (1, 2, 3)] == [*own, max(own)]
    loaded = Predictions(out)
    ids_NL = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(3))
    loaded.behind(loaded.states(ids_NL), ids_NL)
    if "moeflow_layers" in config:  # elsewhere transformers looks for the layer by the number of the published model
        alone = loaded.model.generate(ids_NL, max_new_tokens=4, do_sample=False)
        assert torch.equal(loaded.model.generate(ids_NL, max_new_tokens=4, do_sample=False, use_mtp=True), alone)


@pytest.mark.parametrize("rule", COUNTS)
def test_keeping_a_prediction_layer_is_refused_beside_other_counts(rule: str, short: Path, tmp_path: Path) -> None:
    calibration = calibrated(short, tmp_path, mtp="keep")
    with pytest.raises(
        ValueError, match="mtp='keep': multi-token-prediction layer 3 has 8 experts.*take mtp='prune' or mtp='drop'"
    ):
        COUNTS[rule](calibration)


@pytest.mark.parametrize("method", ["layerwise", "progressive", "swap", "reap"])
def test_keeping_a_prediction_layer_is_refused_by_every_search(method: str, short: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mtp='keep': multi-token-prediction layer 3 has 8 experts"):
        naee.prune(calibrated(short, tmp_path, mtp="keep"), 6, Search(method))
