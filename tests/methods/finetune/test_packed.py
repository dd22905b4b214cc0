"""LoRA beside packed weights: they stay as they are, what was trained is kept beside them, and every reader adds it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from moeflow.engines import engine_of
from moeflow.engines.form import form_of
from moeflow.methods.data import steps as data_
from moeflow.methods.finetune.recipe import Recipe
from moeflow.methods.finetune.trained import factored
from moeflow.methods.graph import Model, Sample
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import naee, tune, unified
from moeflow.methods.recipes.tune import Tuned
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.steps import unpacked
from moeflow.model.checkpoint import save
from moeflow.model.dense import multiply_out
from moeflow.model.engine_form import form_of as form_of_layers
from moeflow.model.factors import multiplied_out
from moeflow.model.layout import Folder, read_config
from moeflow.model.packed import ADDED_IN, ADDED_OUT, PACKED, SCALE
from moeflow.serve.ways import against_native
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
    return tiny.write(request.param, tmp_path / "model")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_in(tmp_path)


def trained(model: Model, folder: Path, **how: Any) -> Tuned:
    data = data_.tokens(matrix_of(folder), model, Sample(8, 16))
    tuned = tune.tune(model, data, Recipe(**(HOW | how)), validation={"same": data})
    run(store_in(folder), alone(tuned.trained))
    return tuned


def packed_as(form: str, source: Path, folder: Path) -> Model:
    if form == ALIKE:
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


ALIKE, FACTORS = "every layer alike", "factors beside whole matrices"
EVERY = [ALIKE, *(f if f == FACTORS else pytest.param(f, marks=pytest.mark.slow) for f in FORMS)]


@pytest.mark.parametrize("form", EVERY)
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
    assert loss_of(out, tmp_path) == pytest.approx(last, abs=1e-4)
    whole = plain(out, tmp_path / "plain")
    close(logits(loaded(out), tmp_path), logits(loaded(whole), tmp_path))
    again = model_in(out)
    assert {again.layers[i].spec.output.format.added for i in again.moe_layers} <= {"low_rank", ""}
    close(logits(loaded(pulled(store, again, tmp_path / "again")), tmp_path), logits(loaded(out), tmp_path))
    for i, layer in enumerate(tuned.model.layers):
        if form == ALIKE:
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


def differing(before: dict[str, Tensor], after: dict[str, Tensor], end: str) -> float:
    """The part of the tensors with this ending that are no longer the same."""
    names = [n for n in before if n.endswith(end)]
    return sum(not torch.equal(after[n], before[n]) for n in names) / len(names)


@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("what", ["scales", "codes"])
def test_trained_scales_and_codes_take_no_bytes(source: Path, form: str, what: str, store: Store, tmp_path: Path) -> None:
    packed = packed_as(form, source, tmp_path)
    tuned = trained(packed, tmp_path, packed=what)
    before, out = stored(pulled(store, packed, tmp_path)), pulled(store, tuned.model, tmp_path)
    after = stored(out)
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert differing(before, after, SCALE) == 1
    assert differing(before, after, PACKED) == (what == "codes")
    first, last = losses(store, tuned)
    assert last < first - 0.02
    assert loss_of(out, tmp_path) == pytest.approx(last, abs=1e-4)
    assert [layer.spec.output.nbytes for layer in tuned.model.layers] == [layer.spec.output.nbytes for layer in packed.layers]


def test_a_second_training_adds_to_the_first_and_pruning_takes_factors_along(store: Store, tmp_path: Path) -> None:
    source = tiny.write("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    first = trained(packed_as(ALIKE, source, tmp_path), tmp_path)
    second = trained(first.model, tmp_path, seed=1)
    assert losses(store, second)[0] == pytest.approx(losses(store, first)[1], abs=2e-3)
    once, twice = (stored(pulled(store, t.model, tmp_path)) for t in (first, second))
    for name in (n for n in once if n.endswith(ADDED_OUT)):
        assert torch.equal(twice[name][:, :RANK], once[name]) and twice[name].shape[1] == 2 * RANK
    again = model_in(pulled(store, second.model, tmp_path / "twice"))
    pruned = pulled(store, naee.prune(calibrated(again, tmp_path), 6, Search("reap")), tmp_path)
    assert sum(n.endswith(ADDED_OUT) for n in stored(pruned)) * 8 == 6 * sum(n.endswith(ADDED_OUT) for n in once)
    close(logits(loaded(pruned), tmp_path), logits(loaded(plain(pruned, tmp_path / "plain")), tmp_path))


def test_unpacked_layers_are_the_sums(store: Store, tmp_path: Path) -> None:
    source = tiny.write("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    tuned = trained(packed_as("bits differ, and some layers are whole", source, tmp_path), tmp_path)
    opened = tuned.model.with_layers({i: unpacked(tuned.model.layers[i]) for i in tuned.model.moe_layers})
    whole = stored(plain(pulled(store, tuned.model, tmp_path), tmp_path / "plain"))
    sums = stored(pulled(store, opened, tmp_path))
    assert sums.keys() == whole.keys()
    for name, matrix in sums.items():
        torch.testing.assert_close(matrix, whole[name].to(matrix.dtype), rtol=2**-7, atol=1e-6)
    for layer in opened.layers:
        shapes = {n: shape for n, (_, shape) in layer.spec.output.tensors.items()}
        assert shapes == {n: tuple(sums[n].shape) for n in shapes}, "planned as it came out"


@pytest.mark.parametrize("how, message", [
    ({"mode": "full"}, "layer 0 is packed in 4 bits, groups of 8, and mode='full' trains its weights; take lora"),
    ({"mode": "experts"}, "mode='experts' trains its weights; take lora, whose additions are kept beside them"),
    ({"targets": ("experts", "shared")}, "layer 0 is packed .*, the shared expert, too, to which nothing can be added"),
])  # fmt: skip
def test_what_cannot_be_trained_of_packed_weights_is_refused(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = tiny.write("deepseek_v2", tmp_path / "model", first_k_dense_replace=0)
    packed = unified.slim(calibrated(model_in(source), tmp_path), Slimming("round_to_nearest", shared=True, **FOUR))
    data = data_.tokens(matrix_of(tmp_path), packed, Sample(8, 16))
    with pytest.raises(ValueError, match=message):
        tune.tune(packed, data, Recipe(**(HOW | how)))


SPOILED: list[tuple[Callable[[dict[str, Tensor], str], Any], str]] = [
    (lambda t, n: t.pop(n + ADDED_IN), r"_added_out \(.*\) and .*_added_in \(\) give no 48 x 32 together"),
    (lambda t, n: t.update({n + ADDED_IN: t[n + ADDED_IN][:1]}), "give no 48 x 32 together"),
    (lambda t, n: (t.pop(n + ADDED_IN), t.pop(n + ADDED_OUT)), "_added_out is missing, which others of its layer have"),
    (lambda t, n: t.update({f"model.norm.weight{ADDED_OUT}": torch.zeros(3, 2)}), "which is not packed|leaves no place for"),
]


def test_factors_that_do_not_fit_are_refused_by_all_who_read(store: Store, tmp_path: Path) -> None:
    source = tiny.write("mixtral", tmp_path / "model")
    out = pulled(store, trained(packed_as(ALIKE, source, tmp_path), tmp_path).model, tmp_path)
    whole = stored(out)
    name = next(n.removesuffix(ADDED_OUT) for n in sorted(whole) if n.endswith(ADDED_OUT) and ".w1." in n)
    for file in [*out.glob("*.safetensors"), *out.glob("*.index.json")]:
        file.unlink()
    for spoil, message in SPOILED:
        tensors = dict(whole)
        spoil(tensors, name)
        save(tensors, out / "model.safetensors")
        for read in (model_in, loaded):
            with pytest.raises(ValueError, match=message):
                read(out)


def test_factors_of_a_product_give_it_back() -> None:
    product = torch.randn(40, 3) @ torch.randn(3, 24)
    out, within = factored(product, 4)
    assert (out.shape, within.shape) == ((40, 4), (4, 24))
    torch.testing.assert_close(out @ within, product, rtol=1e-4, atol=1e-4)
    assert [t.shape for t in factored(product, 99)] == [(40, 24), (24, 24)]
    assert factored(torch.zeros(5, 4), 2)[1].abs().max() == 0


def test_engines_are_told_of_factors_beside_packed_weights(store: Store, tmp_path: Path) -> None:
    source = tiny.write("mixtral", tmp_path / "model")
    model = trained(packed_as(ALIKE, source, tmp_path), tmp_path).model
    config = read_config(Folder(pulled(store, model, tmp_path)))
    planned = form_of_layers([layer.spec.output for layer in model.layers], model.config)
    for form in (form_of(config), planned):
        of_dense = form.dense
        assert form.ranks and not of_dense.ranks
        runs = {name: not form.why_not(engine_of(name)) for name in ("moeflow", "vllm-moeflow", "transformers", "vllm")}
        assert runs == {"moeflow": True, "vllm-moeflow": True, "transformers": False, "vllm": False}
        assert not any(of_dense.why_not(engine_of(name)) for name in runs)
    assert "has low-rank additions" in against_native(config)
