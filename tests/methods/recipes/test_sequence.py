"""Layers that are rewritten one after the other are calibrated on what their blocks take in behind the rewritten ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.prune.counts import Counts
from moeflow.methods.recipes import moei2, unified
from moeflow.methods.recipes.sequence import in_sequence
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.trim.steps import gone
from moeflow.model import passes
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import file_of
from moeflow.model.packed import PACKED
from moeflow.step import Part, Step, upstream
from tests import running, tiny


def test_inputs_alone_are_those_that_a_whole_pass_records(family: Path, tmp_path: Path) -> None:
    """Bit for bit, also where they end within a sequence."""
    model, store = running.model_in(family), running.store_in(tmp_path)
    passed = Pass(batch=4, shard=8, stage=2, record=72)
    calibration = calibrate.run(model, data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16)), passed)
    pruned = moei2.prune(calibration, Counts(6 / 8, rule="uniform"))
    seen: dict[bool, dict[int, tuple[Part, ...]]] = {True: {}, False: {}}

    def sequence(statistics: bool) -> tuple[Step, ...]:
        def rewrite(i: int, _: Step, recorded: tuple[Part, ...]) -> Step:
            seen[statistics][i] = recorded
            return pruned.layers[i]

        return in_sequence(calibration, rewrite, statistics=statistics)[1]

    running.run(store, *sequence(True), *sequence(False), *(p.step for each in seen.values() for ps in each.values() for p in ps))
    assert {*seen[True]} == {*seen[False]} == {*model.moe_layers}
    for i in model.moe_layers:
        (whole,), (alone,) = (
            [Tensors(store.artifact(p.step.key).file(file_of(i))) for p in seen[statistics][i]] for statistics in (True, False)
        )
        rows = int(alone["sample"])
        assert rows == int(whole["sample"]) == len(alone["x_RD"]) == 72
        assert torch.equal(alone["x_RD"], whole["x_RD"][:rows])


def test_inputs_alone_cost_no_experts(family: Path, tmp_path: Path) -> None:
    model = running.model_in(family)
    calibration = calibrate.run(
        model, data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16)), Pass(batch=2, shard=8, record=32)
    )
    rewritten: list[Part] = []

    def rewrite(_: int, file: Step, recorded: tuple[Part, ...]) -> Step:
        rewritten.extend(recorded)
        return file

    in_sequence(calibration, rewrite, statistics=False)
    observed = [s for s in upstream(calibration.ends) if s.name == "calibrate.observe"]
    assert all(p.step.name == "calibrate.inputs" for p in rewritten)
    alone, whole = (sum(sum(s.spec.operations.values()) for s in steps) for steps in ([p.step for p in rewritten], observed))
    assert 0 < 4 * alone < whole


@pytest.mark.parametrize("record, method", [(0, "round_to_nearest"), (32, "gptq")])
def test_a_layer_without_its_block_and_a_calibration_without_inputs_are_slimmed_in_sequence(
    record: int, method: str, tmp_path: Path
) -> None:
    model, store = running.model_in(tiny.write("mixtral", tmp_path / "model")), running.store_in(tmp_path)
    without = model.with_layers({1: gone(model.essential, model.layers[1], layer=1)})
    matrix = data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16))
    calibration = calibrate.run(without, matrix, Pass(batch=2, shard=4, record=record))
    slimmed = unified.slim(calibration, Slimming(method, bits=4, group=8, inputs="sequential"))
    running.run(store, *slimmed.layers)
    packed = [any(n.endswith(PACKED) for n in Tensors(running.read(store, file)).info) for file in slimmed.layers]
    assert packed == [True, False, True]


def test_a_layer_of_which_a_run_takes_the_block_has_no_inputs(tmp_path: Path) -> None:
    """As where `fit` decides that no block pays: the graph is built before it is known."""
    model, store = running.model_in(tiny.write("mixtral", tmp_path / "model")), running.store_in(tmp_path)
    taken = gone(model.essential, model.layers[1], layer=1)
    running.run(store, taken)
    save_file({"hidden_NLD": torch.randn(3, 16, int(model.config["hidden_size"]))}, tmp_path / "states")
    how = {"recorded": 20, "batch": 2, "dtype": "float32", "progress": lambda *_: None}
    passes.inputs(dict(model.config), tmp_path / "states", 1, running.read(store, taken), tmp_path / "out", **how)
    assert {name: int(t) for name, t in load_file(tmp_path / "out").items()} == {"tokens": 48}
