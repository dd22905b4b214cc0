"""How many sequences run together is a matter of room: no key knows it, and what is computed is the same but for last bits."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.data import steps as data
from moeflow.methods.fit.options import Budget, Offers
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.prune.counts import Counts
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import fit, moei2, naee
from moeflow.methods.records import Curves
from moeflow.model import passes
from moeflow.model.memory import CONTEXT, MARGIN, run_per_token, together
from moeflow.model.stream import Stream
from moeflow.step import Step, upstream
from tests import predicting, running, tiny


def calibrated(source: Path, folder: Path, batch: int, **options: str) -> calibrate.Calibration:
    model = running.model_in(source, **options)
    matrix = data.tokens(running.matrix_of(folder), model, Sample(8, 16))
    return calibrate.run(model, matrix, Pass(batch, 4, 2, record=48))


def _fitted(calibration: calibrate.Calibration) -> list[Step]:
    made = fit.compress(calibration, Budget(ratio=0.25), Offers(group=16, measured=64))
    return [*made.model.layers, *made.reports]


def _spans(calibration: calibrate.Calibration) -> list[Step]:
    return [*moei2.prune(calibration, Counts(0.75), Search("enumerate", best=2, span=2)).layers]


@pytest.mark.parametrize(
    "graph, steps",
    [
        (_fitted, {"calibrate.observe", "calibrate.advance", "calibrate.forks", "calibrate.inputs"}),
        (_spans, {"calibrate.observe", "calibrate.forks", "prune.span_of_shard"}),
    ],
)
def test_how_many_run_together_is_in_no_key_and_reaches_every_step(
    graph: Callable[[calibrate.Calibration], list[Step]], steps: set[str], tmp_path: Path
) -> None:
    source = tiny.write("mixtral", tmp_path / "model")
    every = [upstream(graph(calibrated(source, tmp_path, batch))) for batch in (0, 1, 3)]
    assert len({tuple(s.key for s in each) for each in every}) == 1
    for batch, each in zip((0, 1, 3), every, strict=True):
        settings = {s.name: s.resources.settings for s in each}
        assert {name: settings[name].get("batch", 0) for name in steps} == dict.fromkeys(steps, batch)
        assert all(s.resources.gpus == 1 for s in each if s.name in steps)


def test_prediction_layers_are_bounded_too(tmp_path: Path) -> None:
    source = predicting.write("deepseek_v3", tmp_path / "model", num_hidden_layers=3, first_k_dense_replace=1)
    plain, bounded = (
        {s.key: s for s in upstream(naee.prune(calibrated(source, tmp_path, batch, mtp="prune"), 6).extra)} for batch in (0, 2)
    )
    assert {*plain} == {*bounded}
    (observed,) = {str(s.resources.settings) for s in bounded.values() if s.name == "predict.observe"}
    assert observed == "{'batch': 2}"


@pytest.mark.parametrize("room", [0, 1 << 40], ids=["one", "all"])
def test_the_same_is_recorded_and_measured_whatever_the_room(
    family: Path, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = running.model_in(family)
    matrix = data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16))
    ran: list[int] = []
    run = Stream.run

    def seen(self: Stream, module: nn.Module, layer: int, states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ran.append(len(states["hidden_NLD"]))
        return run(self, module, layer, states)

    @dataclass
    class Made:
        ends: torch.Tensor
        counts: list[torch.Tensor]
        curves: Curves

    def made(name: str, batch: int) -> Made:
        store = running.store_in(tmp_path / name)
        calibration = calibrate.run(model, matrix, Pass(batch, 8, 2, record=48))
        layer = model.moe_layers[0]
        each = calibrate.Alternatives(calibrate.Forks("each", ("0", "1")))
        curves = calibrate.curves(calibration, {layer: each}, tokens=128)
        running.run(store, *calibration.ends, curves)
        parts = [store.artifact(p.step.key).file(p.prefix) for i in model.moe_layers for p in calibration.observed[i]]
        return Made(
            load_file(store.artifact(calibration.ends[0].key).file("hidden.safetensors"))["hidden_NLD"],
            [load_file(p)["count_E"] for p in parts],
            Curves.read(store.artifact(curves.key)),
        )

    bounded = made("bounded", 3)
    monkeypatch.setattr(passes, "ON_PROCESSOR", room)
    monkeypatch.setattr(passes, "OF_WEIGHTS", 0.0)
    monkeypatch.setattr(Stream, "run", seen)
    free = made("free", 0)
    assert set(ran) == ({1} if room == 0 else {8})
    torch.testing.assert_close(free.ends, bounded.ends, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(free.counts, bounded.counts, strict=True))
    layer = model.moe_layers[0]
    assert free.curves.curves[layer] == pytest.approx(bounded.curves.curves[layer], rel=1e-3, abs=1e-9)


def test_on_a_processor_activations_take_half_of_what_large_weights_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.write("mixtral", tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    stream, tensors = Stream(config), passes.Tensors(source)
    of_layer = {n: tensors[n] for n in tensors if n.startswith("model.layers.0.")}
    module, weights = stream.layer(of_layer, 0), sum(t.nbytes for t in of_layer.values())
    one = run_per_token(config, {n: t.shape for n, t in of_layer.items()}, stream.dtype.itemsize)

    def fitting(room: int) -> int:
        monkeypatch.setattr(passes, "ON_PROCESSOR", room)
        return passes.at_once(stream, module, of_layer, 1, 0)

    assert fitting(0) == weights // 2 // one > 1
    assert fitting(weights // 2 + 3 * one) == (weights // 2 + 3 * one) // one


def test_on_a_gpu_activations_take_half_of_what_the_weights_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.write("mixtral", tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    stream, tensors = Stream(config), passes.Tensors(source)
    of_layer = {n: tensors[n] for n in tensors if n.startswith("model.layers.0.")}
    module = stream.layer(of_layer, 0)
    weights = sum(t.nbytes for t in of_layer.values())
    one = 16 * run_per_token(config, {n: t.shape for n, t in of_layer.items()}, stream.dtype.itemsize, recorded=True)
    monkeypatch.setattr(stream, "device", torch.device("cuda"))

    def fitting(sequences: float, batch: int = 0, copies: int = 1) -> int:
        whole = CONTEXT + MARGIN * (copies * 2 * weights + 2 * sequences * one) + 16  # as much of the next layer, too
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=int(whole)))
        return passes.at_once(stream, module, of_layer, 16, batch, copies=copies, recorded=True)

    assert [fitting(n) for n in (0.5, 1, 1.9, 5, 40)] == [1, 1, 1, 5, 40]
    assert fitting(40, batch=6) == 6 and fitting(3, batch=6) == 3 and fitting(7, copies=2) == 7
    assert together(0, 5) == together(-9, 5) == 1
    monkeypatch.setenv("MOEFLOW_GPU_SHARE", "0.5")
    assert fitting(40) < 20 and fitting(2 * 40 + (CONTEXT / MARGIN + 2 * weights) / (2 * one)) == 40, (
        "half a GPU has half of its memory"
    )


def test_experts_in_a_stack_are_counted_as_single_ones(tmp_path: Path) -> None:
    """A file of stacks tells no less of activations than one of matrices, and at most a third of an expert more."""
    config = json.loads((tiny.write("mixtral", tmp_path / "model") / "config.json").read_text())
    shapes = {n: t.shape for n, t in passes.Tensors(tmp_path / "model").items() if n.startswith("model.layers.0.")}
    single = run_per_token(config, shapes, 4)
    experts = [n for n in shapes if ".experts." in n]
    count, inner, width = config["num_local_experts"], config["intermediate_size"], config["hidden_size"]
    stem = experts[0].split(".experts.")[0] + ".experts."
    stacks = {stem + "gate_up_proj": (count, 2 * inner, width), stem + "down_proj": (count, width, inner)}
    stacked = run_per_token(config, {n: s for n, s in shapes.items() if n not in experts} | stacks, 4)
    assert single <= stacked <= 1.34 * single


def test_a_recipe_of_an_earlier_release_says_shards_of_four_batches() -> None:
    assert Pass(batch=8, shard=0) == Pass(batch=8) and Pass().shard == 32
