"""LoRA beside packed weights: they stay as they are, what was trained is kept beside them, and every reader adds it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from moeflow.methods.data import steps as data_
from moeflow.methods.finetune.recipe import Recipe
from moeflow.methods.graph import Model, Sample
from moeflow.methods.recipes import tune, unified
from moeflow.methods.recipes.tune import Tuned
from moeflow.methods.slim.methods import Slimming
from moeflow.model.dense import multiply_out
from moeflow.model.factors import multiplied_out
from moeflow.model.packed import ADDED_IN, ADDED_OUT, PACKED
from moeflow.store import Store
from tests import tiny
from tests.methods.slim.test_loading import FAMILIES, FORMS, slimmed_as
from tests.models import calibrated, close, loaded, logits, pulled
from tests.running import alone, array_of, matrix_of, model_in, run, store_in
from tests.slimmed import FOUR, plain

RANK = 2
HOW: dict[str, Any] = {"steps": 4, "batch": 4, "rate": 2e-2, "warmup": 0.0, "rank": RANK, "alpha": 8.0, "dtype": "float32"}


@pytest.fixture(params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny.write(request.param, tmp_path / "model", dtype=torch.bfloat16)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_in(tmp_path)


def trained(model: Model, folder: Path, **how: Any) -> Tuned:
    data = data_.tokens(matrix_of(folder), model, Sample(8, 16))
    tuned = tune.tune(model, data, Recipe(**(HOW | how)), validation={"same": data})
    run(store_in(folder), alone(tuned.trained))
    return tuned


def packed_as(form: str, source: Path, folder: Path) -> Model:
    if form == "every layer alike":
        return unified.slim(calibrated(model_in(source), folder), Slimming("round_to_nearest", **FOUR))
    return slimmed_as(form, source, folder)


def losses(store: Store, tuned: Tuned) -> tuple[float, float]:
    assert tuned.trained is not None
    before, after = json.loads(store.artifact(tuned.trained.key).file("training.json").read_text())["validations"]
    return before["mean"], after["mean"]


def loss_of(folder: Path, tokens: Path) -> float:
    ids = torch.from_numpy(array_of(matrix_of(tokens)))
    return float(cross_entropy(logits(loaded(folder), tokens)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def stored(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


@pytest.mark.parametrize("form", ["every layer alike", *FORMS])
def test_what_lora_trained_of_packed_experts_is_kept_beside_them(source: Path, form: str, store: Store, tmp_path: Path) -> None:
    """The packed weights stay bit for bit; transformers, a second import and what is multiplied out add the factors."""
    packed = packed_as(form, source, tmp_path)
    tuned = trained(packed, tmp_path)
    before, out = stored(pulled(store, packed, tmp_path)), pulled(store, tuned.model, tmp_path)
    after = stored(out)
    names = [n.removesuffix(PACKED) for n in before if n.endswith(PACKED)]
    assert names and {n for n in after if n not in before} == {n + end for n in names for end in (ADDED_OUT, ADDED_IN)}
    assert all(torch.equal(after[n], before[n]) for n in before if ".experts." in n and n.startswith(tuple(names)))
    assert max(after[n + ADDED_OUT].shape[1] for n in names) == RANK
    first, last = losses(store, tuned)
    assert last < first - 0.02
    assert loss_of(out, tmp_path) == pytest.approx(last, abs=2e-3), "the additions are stored in bf16"
    whole = plain(out, tmp_path / "plain")
    close(logits(loaded(out), tmp_path), logits(loaded(whole), tmp_path))
    again = model_in(out)
    assert {again.layers[i].spec.output.format.added for i in again.moe_layers} <= {"low_rank", ""}
    close(logits(loaded(pulled(store, again, tmp_path / "again")), tmp_path), logits(loaded(out), tmp_path))
    for i, layer in enumerate(tuned.model.layers):
        if form == "every layer alike":
            assert layer.spec.output.tensors == again.layers[i].spec.output.tensors, "planned as it came out"
    saved = loaded(out)
    saved.save_pretrained(tmp_path / "saved")
    assert "added" not in (tmp_path / "saved" / "config.json").read_text()
    assert torch.equal(logits(loaded(tmp_path / "saved"), tmp_path), logits(saved, tmp_path))
    multiply_out(out)
    opened = stored(out)
    assert not any(n.endswith((PACKED, ADDED_OUT, ADDED_IN)) or ".factor" in n for n in opened)
    for name, matrix in multiplied_out(stored(whole)).items():
        torch.testing.assert_close(opened[name], matrix.to(opened[name].dtype), rtol=2**-7, atol=5e-3)
    loaded(out)
