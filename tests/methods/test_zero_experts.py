"""Experts whose weights are zero, as where a checkpoint was padded with them: every method goes on, and its model predicts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeflow.arch import Family
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.graph import Calibration, Model
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import moei2, naee, unified
from moeflow.methods.slim.methods import METHODS, Slimming
from moeflow.model.layout import Folder, read_config
from tests import tiny
from tests.models import calibrated, loaded, logits, pulled
from tests.running import model_in, store_in

SHARD = "model.safetensors"


def slim(method: str) -> Callable[[Calibration], Model]:
    how: dict[str, Any] = {"bits": 8, "group": 8, "packed": False} if METHODS[method].quantizes else {"pattern": "2:4"}
    return lambda seen: unified.slim(seen, Slimming(method, **how))


def decompose(**how: Any) -> Callable[[Calibration], Model]:
    return lambda seen: moei2.decompose(seen, Decomposition(ratio=0.3, least=1, **how))


def prune(search: str) -> Callable[[Calibration], Model]:
    return lambda seen: naee.prune(seen, 6, Search(search))


MADE: dict[str, Callable[[Calibration], Model]] = {
    **{method: slim(method) for method in METHODS},
    "uniform ranks": decompose(ranks="uniform"),
    "global ranks": decompose(ranks="global"),
    "ranks of the paper": decompose(ranks="paper", importance="recon"),
    **{search: prune(search) for search in ("swap", "reap", "frequency")},
}


def zeroed(folder: Path, *, down_alone: bool) -> Path:
    """A tiny Mixtral of which one expert in the first layer gives nothing."""
    tiny.write("mixtral", folder)
    family, tensors = Family.of(read_config(Folder(folder))), load_file(folder / SHARD)
    names = family.expert(0, 1)
    for name in names[-1:] if down_alone else names:
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, folder / SHARD, {"format": "pt"})
    return folder


@pytest.mark.parametrize("down_alone", [True, False], ids=["down", "all"])
@pytest.mark.parametrize("method", MADE)
@torch.inference_mode()
def test_an_expert_of_zeros_stops_no_method(method: str, down_alone: bool, tmp_path: Path) -> None:
    folder = zeroed(tmp_path / "model", down_alone=down_alone)
    model = MADE[method](calibrated(model_in(folder), tmp_path))
    out = pulled(store_in(tmp_path), model, tmp_path)
    assert logits(loaded(out), tmp_path).isfinite().all()
