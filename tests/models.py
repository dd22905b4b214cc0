"""Graphs of whole small models, what they make, and what it computes when transformers loads it."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.fewer_active import steps as fewer_active
from moeflow.methods.graph import Calibration, Model, Pass, Sample
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, naee
from moeflow.sources import Texts
from moeflow.step import Step
from moeflow.store import Store
from tests.running import alone, array_of, matrix_of, model_in, run, store_in

PLAIN = {"qwen2_moe": {"mlp_only_layers": []}}
"""The changes to a family's tiny configuration that give every layer experts."""


def calibrated(model: Model, folder: Path, *, between: bool = True, **options: Any) -> Calibration:
    """A calibration of the model on the 8 × 16 random tokens of `ids_of(folder)`."""
    passed = Pass(**{"batch": 2, "shard": 4, "stage": 2} | options)
    return calibrate.run(model, data.tokens(matrix_of(folder), model, Sample(8, 16)), passed, between=between)


def ids_of(folder: Path) -> Tensor:
    """The tokens [8, 16] of the file that `matrix_of(folder)` writes."""
    return torch.from_numpy(array_of(matrix_of(folder)))


def pulled(store: Store, model: Model, folder: Path) -> Path:
    """Run the graph of the model in this process, and fetch its checkpoint into a folder of its own."""
    target = alone(checkpoint.checkpoint_of(model))
    run(store, target)
    out = folder / f"out-{target.key[-8:]}"
    store.fetch(target.key, out)
    return out


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any, folder: Path) -> Tensor:
    """The model's logits [8, 16, V] on the tokens of `ids_of(folder)`."""
    with torch.inference_mode():
        found: Tensor = model(ids_of(folder)).logits
    return found


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def graph(model: Model, matrix: Texts, *, keep: int = 5, how: str | Search = "layerwise") -> Step:
    """The checkpoint of a model pruned to `keep` experts per layer, with the reports that compare it with the original."""
    seen = calibrate.run(model, data.tokens(matrix, model, Sample(8, 16)), Pass(batch=4, shard=4, stage=2))
    pruned = naee.prune(seen, keep, Search(how) if isinstance(how, str) else how)
    reports = compare.reports(model, pruned, compare.HeldOut("nowhere.txt", 4, 16), Pass(4), tokens=seen.tokens)
    return checkpoint.checkpoint_of(pruned).reporting(*reports)


def attached(source: Path, out: Path, **options: Any) -> Path:
    """A checkpoint with Compressed Experts, pulled."""
    model = fewer_active.attach(model_in(source), fewer_active.CompressedExperts(**options))
    store, target = store_in(out.parent), checkpoint.checkpoint_of(model)
    run(store, target)
    held = store.artifact(target.key)
    return Path(shutil.copytree(held.folder(), out))
