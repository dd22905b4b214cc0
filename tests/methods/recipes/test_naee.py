"""The whole model pruned layer by layer, by any search."""

import json
from pathlib import Path
from typing import Any

import pytest

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Calibration, Pass, Sample
from moeflow.methods.prune.searches import METHODS, Search
from moeflow.methods.recipes import naee
from moeflow.store import Store
from tests import running, tiny


def calibrated(folder: Path, **config: int) -> tuple[Store, Calibration]:
    model = running.model_in(tiny.write("mixtral", folder / "model", **config))
    matrix = data.tokens(running.matrix_of(folder), model, Sample(8, 16))
    return running.store_in(folder), calibrate.run(model, matrix, Pass(batch=4, shard=4))


@pytest.mark.parametrize("method", ["enumerate", "genetic", "swap"])
def test_another_search_of_every_layer_chooses_what_the_exact_one_chooses(method: str, tmp_path: Path) -> None:
    """Where there are as few subsets as here, every search evaluates all or begins at the most."""
    store, calibration = calibrated(tmp_path)
    exact, other = naee.prune(calibration, 6), naee.prune(calibration, 6, Search(method, starts=28))
    running.run(store, *exact.choices, *other.choices, *other.layers)

    def chosen(key: str) -> dict[str, Any]:
        return json.loads(store.artifact(key).file("choice.json").read_text())

    for one, two in zip(exact.choices, other.choices, strict=True):
        theirs, ours = chosen(one.key), chosen(two.key)
        assert ours["keep"] == theirs["keep"] and ours["criterion"] == method
        assert ours["loss"]["value"] == pytest.approx(theirs["loss"]["value"], rel=1e-4)
        assert ours["runner_up"]["keep"] == theirs["runner_up"]["keep"]


@pytest.mark.parametrize("method", ["layerwise", "progressive", "enumerate"])
def test_too_many_subsets_to_enumerate_are_refused_with_every_other_search_and_score(method: str, tmp_path: Path) -> None:
    _, calibration = calibrated(tmp_path, num_local_experts=32)
    with pytest.raises(ValueError, match="means 10,518,300 subsets, over 20,000") as refused:
        naee.prune(calibration, 24, Search(method))
    others = set(METHODS) - {"layerwise", "progressive", "enumerate"}
    assert {"genetic", "swap", "reap"} <= others and all(name in str(refused.value) for name in others)
    assert "\n" not in str(refused.value)
