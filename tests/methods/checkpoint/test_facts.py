"""What was done to each layer of a model, in order, as `moeflow.json` of its checkpoint tells it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeflow.methods.fewer_active.steps import skip
from moeflow.methods.graph import Calibration, Model
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import naee, unified
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.trim.steps import Trimming, trim
from moeflow.step import upstream
from tests import tiny
from tests.models import calibrated, loaded, pulled
from tests.running import facts_of, model_in, store_in


@pytest.fixture
def slimmed(tmp_path: Path) -> Calibration:
    """A calibration of a model with quantized experts, whose first layer hardly turns the hidden states."""
    source = tiny.write("mixtral", tmp_path / "model", num_hidden_layers=4)
    model = loaded(source)
    with torch.no_grad():
        for weight in (model.model.layers[0].self_attn.o_proj.weight, model.model.layers[0].mlp.experts.down_proj):
            weight *= 1e-3
    model.save_pretrained(source)
    calibration = calibrated(model_in(source), tmp_path)
    return calibrated(unified.slim(calibration, Slimming(method="round_to_nearest", bits=8, group=4, inputs="parallel")), tmp_path)


@pytest.mark.parametrize(
    ("then", "steps"),
    [
        (lambda calibration: trim(calibration, Trimming("experts", 2, across="layer")), ["rewrite.experts"] * 4),
        (lambda calibration: naee.prune(calibration, 6, Search("reap")), ["rewrite.experts"] * 4),
        (lambda calibration: trim(calibration, Trimming("decoder_layers", 1)), ["trim.renumber"] * 3),
        (lambda calibration: trim(calibration, Trimming("moe_blocks", 1)), ["trim.without_moe_block"]),
        (skip, ["fewer_active.skipping"] * 4),
    ],
)
def test_what_follows_a_slimming_does_not_forget_it(
    then: Callable[[Calibration], Model], steps: list[str], slimmed: Calibration, tmp_path: Path
) -> None:
    done = facts_of(pulled(store_in(tmp_path), then(slimmed), tmp_path))
    assert all(layer[0]["step"] == "slim.layer" and len(layer[0]["experts"]) == 8 for layer in done.values())
    assert [fact["step"] for layer in done.values() for fact in layer[1:]] == steps


def test_a_layer_that_a_trimming_leaves_alone_is_the_same_artifact_content(slimmed: Calibration, tmp_path: Path) -> None:
    """So that what depends on that layer alone is not computed again (early cutoff)."""
    store, thinner = store_in(tmp_path), trim(slimmed, Trimming("moe_blocks", 1))
    pulled(store, thinner, tmp_path)
    steps = {s.params["layer"]: s for s in upstream([slimmed.model.layers[3]]) if s.name == "slim.layer"}
    before, after = (store.artifact(layer.key) for layer in (steps[3], thinner.layers[3]))
    assert before.names() == after.names()
    assert all(before.file(n).read_bytes() == after.file(n).read_bytes() for n in before.names())


def test_a_compressed_checkpoint_that_is_compressed_again_tells_both_in_order(tmp_path: Path) -> None:
    store, source = store_in(tmp_path), tiny.write("mixtral", tmp_path / "model")
    once = pulled(store, naee.prune(calibrated(model_in(source), tmp_path), 6, Search("reap")), tmp_path)
    twice = pulled(store, trim(calibrated(model_in(once), tmp_path), Trimming("experts", 1, across="layer")), tmp_path)
    before, after = facts_of(once), facts_of(twice)
    assert [len(done) for done in before.values()] == [1, 1, 1]
    for layer, done in after.items():
        assert done[:1] == before[layer] and [(d["step"], d["experts"]) for d in done[1:]] == [("rewrite.experts", 6)]
    assert facts_of(pulled(store, model_in(twice), tmp_path)) == after
