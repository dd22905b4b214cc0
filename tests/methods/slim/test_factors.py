"""Low-rank experts quantized: their factors are packed, loaded and computed like any other matrix."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moeflow.arch import Family
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.fewer_active import steps as fewer_active
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import moei2, naee, unified
from moeflow.methods.slim.grid import Grid
from moeflow.methods.slim.methods import Slimming
from moeflow.model.checkpoint import Tensors
from moeflow.model.dense import multiply_out
from moeflow.model.layout import Folder, headers, read_config
from moeflow.model.packed import PACKED, SCALE
from tests import tiny
from tests.models import calibrated, close, loaded, logits, pulled
from tests.running import model_in, run, store_in
from tests.slimmed import FOUR, compensated, nearest, plain, reports, routed

RANKS: dict[str, dict[str, Any]] = {
    "uniform": {"ranks": "uniform", "multiple": 8},
    "decided by a run": {"ranks": "paper", "importance": "recon", "alpha": 2.0, "multiple": 4},
}
GRIDS: dict[str, dict[str, Any]] = {"uniform": FOUR, "decided by a run": {"bits": 8, "group": 4}}


@pytest.fixture(params=tiny.families())
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny.write(request.param, tmp_path / "model")


@pytest.mark.parametrize("ranks", [pytest.param("uniform", marks=pytest.mark.slow), "decided by a run"])
def test_packed_factors_load_and_compute_what_their_codes_say(source: Path, ranks: str, tmp_path: Path) -> None:
    """By `from_pretrained` and streamed; skipping, another search and a second import go on from there."""
    store, calibration = store_in(tmp_path), calibrated(model_in(source), tmp_path)
    low = moei2.decompose(calibration, Decomposition(ratio=0.3, **RANKS[ranks]))
    packed = unified.slim(calibrated(low, tmp_path), Slimming(method="gptq", **GRIDS[ranks]))
    out, before = pulled(store, packed, tmp_path), pulled(store, low, tmp_path)
    config = read_config(Folder(out))
    family = Family.of(config)
    assert config["model_type"].startswith("moeflow_")
    assert config["moeflow_layers"] == read_config(Folder(before))["moeflow_layers"]
    names = headers(Folder(out))
    for i in family.moe_layers:
        factors = [f for e in range(8) for n in family.expert(i, e) for f in family.factors(n)]
        assert [f for f in factors if f in Tensors(before)] == [f for f in factors if f + PACKED in names]
        assert not any(f in names for f in factors)
    ours = logits(loaded(out), tmp_path)
    close(ours, logits(loaded(plain(out, tmp_path / "plain")), tmp_path))
    dense = shutil.copytree(out, tmp_path / "dense")
    assert multiply_out(dense)["matrices"] == 3 * 8 * len(family.moe_layers)
    assert read_config(Folder(dense))["model_type"] == read_config(Folder(source))["model_type"]
    assert not any(n.endswith((PACKED, SCALE)) or ".factor" in n for n in headers(Folder(dense)))
    close(logits(loaded(dense), tmp_path), ours)
    again = model_in(out)
    assert again.layers[-1].spec.output.packed and again.layers[-1].spec.output.format.low_rank
    close(logits(loaded(pulled(store, again, tmp_path / "again")), tmp_path), ours)
    kept = pulled(store, naee.prune(calibrated(again, tmp_path), 6, Search("reap")), tmp_path)
    close(logits(loaded(kept), tmp_path), logits(loaded(plain(kept, tmp_path / "plain-kept")), tmp_path))
    if "phimoe" not in config["model_type"]:
        skips = pulled(store, fewer_active.skip(calibrated(packed, tmp_path), fewer_active.Skipping(1.5)), tmp_path)
        close(logits(loaded(skips), tmp_path), logits(loaded(plain(skips, tmp_path / "plain-skips")), tmp_path))


@torch.inference_mode()
def test_the_second_factor_is_treated_by_what_the_first_gives_it(tmp_path: Path) -> None:
    store, calibration = store_in(tmp_path), calibrated(model_in(tiny.write("mixtral", tmp_path / "model")), tmp_path)
    low = calibrated(moei2.decompose(calibration, Decomposition(rank=8)), tmp_path)
    out = pulled(store, unified.slim(low, Slimming(method="gptq", **FOUR)), tmp_path)
    before = pulled(store, low.model, tmp_path)
    family, was, stored = Family.of(read_config(Folder(out))), Tensors(before), Tensors(out)
    x, chosen = routed(before, tmp_path, 0)
    rows, grid = x[chosen[:, 3]], Grid(4, True, 8)
    for name in family.expert(0, 3)[:2]:
        out_name, in_name = family.factors(name)
        first = compensated(was[in_name], grid, rows).dequantized()
        close(stored[in_name], first)
        by_first = compensated(was[out_name], grid, rows @ first.T).dequantized()
        by_itself = nearest(was[out_name], grid).dequantized()
        same = (stored[out_name] - by_first).abs() < 1e-5
        assert same.float().mean() > 0.98 > ((stored[out_name] - by_itself).abs() < 1e-5).float().mean()
    lost = [e["lost"][m] for r in reports(out) for e in r["experts"] for m in ("gate", "up", "down") if e["by"] == "gptq"]
    assert lost and all(0 < value < 0.05 for value in lost)


def test_a_task_for_each_share_of_the_experts_has_the_same_bytes(tmp_path: Path) -> None:
    store, calibration = store_in(tmp_path), calibrated(model_in(tiny.write("mixtral", tmp_path / "model")), tmp_path)
    low = calibrated(moei2.decompose(calibration, Decomposition(ratio=0.3, **RANKS["decided by a run"])), tmp_path)
    how = {"method": "gptq", **GRIDS["decided by a run"]}
    made = [checkpoint.checkpoint_of(unified.slim(low, Slimming(tasks=tasks, **how))) for tasks in (1, 3)]
    for step in made:
        run(store, step)
    one, three = (store.artifact(step.key) for step in made)
    assert {n: one.size(n) for n in one.names()} == {n: three.size(n) for n in three.names()}
    for name in one.names():
        if name.endswith(".safetensors"):
            assert one.read(name, 0, one.size(name)) == three.read(name, 0, three.size(name))


def test_factors_that_cannot_be_packed_are_refused_when_the_graph_is_built(tmp_path: Path) -> None:
    calibration = calibrated(model_in(tiny.write("mixtral", tmp_path / "model")), tmp_path)
    decided = moei2.decompose(calibration, Decomposition(ratio=0.3, **RANKS["decided by a run"]))
    odd, even = (
        moei2.decompose(calibration, Decomposition(rank=6, svd="vanilla")),
        moei2.decompose(calibration, Decomposition(rank=8, svd="vanilla")),
    )
    for message, model, how in (
        (
            r"layer 0 are decided by a run, as multiples of 4: at 4 bits in groups of 8 they .* decompose with multiple=8",
            decided,
            {},
        ),
        ("group=8 does not divide 6 columns", odd, {}),
        ("bits=4 of 6 columns of .*factor_out fill no whole words", odd, {"group": 0}),
        ("layer 0 has low-rank experts, whose factors awq does not slim; take round_to_nearest or gptq", even, {"method": "awq"}),
        ("whose factors wanda does not slim", even, {"method": "wanda"}),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            unified.slim(calibrated(model, tmp_path), Slimming(**({"method": "gptq", **FOUR} | how)))
        assert "\n" not in str(refused.value)
    loose = unified.slim(calibrated(odd, tmp_path), Slimming(method="gptq", **(FOUR | {"group": 0, "packed": False})))
    out = pulled(store_in(tmp_path), loose, tmp_path)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert torch.isfinite(logits(loaded(out), tmp_path)).all()


@pytest.mark.parametrize("method", ["gptq", "round_to_nearest"])
def test_factors_of_more_components_than_the_expert_saw_tokens_are_slimmed(method: str, tmp_path: Path) -> None:
    """Rounding leaves sums of squares below zero where the tokens have nothing of a component."""
    calibration = calibrated(model_in(tiny.write("mixtral", tmp_path / "model")), tmp_path, record=8)
    low = moei2.decompose(calibration, Decomposition(rank=16, shrink=0.0))
    out = pulled(store_in(tmp_path), unified.slim(calibrated(low, tmp_path, record=8), Slimming(method, **FOUR)), tmp_path)
    assert torch.isfinite(logits(loaded(out), tmp_path)).all()
    assert all(value >= 0 for r in reports(out) for e in r["experts"] for value in e["lost"].values())
