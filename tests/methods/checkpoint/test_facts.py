"""What was done to each layer of a model, in order, as `moeflow.json` of its checkpoint tells it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moeflow.methods.graph import Calibration, Model
from moeflow.methods.recipes import moei2, naee, unified
from moeflow.methods.trim import steps as trim
from tests import tiny
from tests.models import calibrated, pulled
from tests.running import facts_of, model_in, store_in


def quantized(seen: Calibration) -> Model:
    return unified.slim(seen, method="round_to_nearest", bits=8, group=4, inputs="parallel")


@pytest.mark.parametrize(
    ("then", "name"),
    [
        (lambda seen: trim.expert_drop(seen, keep=6, across="layer"), "rewrite.experts"),
        (lambda seen: naee.by_criterion(seen, criterion="reap", keep=6), "rewrite.experts"),
        (lambda seen: trim.block_drop(seen, drop=2), "trim.renumber"),
    ],
)
def test_what_follows_a_slimming_does_not_forget_it(then: Callable[[Calibration], Model], name: str, tmp_path: Path) -> None:
    model = model_in(tiny.write("mixtral", tmp_path / "model", num_hidden_layers=4))
    slimmed = quantized(calibrated(model, tmp_path))
    done = facts_of(pulled(store_in(tmp_path), then(calibrated(slimmed, tmp_path)), tmp_path))
    assert all(layer[0]["step"] == "slim.layer" and len(layer[0]["experts"]) == 8 for layer in done.values())
    assert [layer[1]["step"] for layer in done.values() if layer[1:]][-1] == name
