"""Run steps for a test: in this process, in a store of the test's own."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.graph import Model
from moeflow.model.layout import LAYER
from moeflow.run import in_process
from moeflow.run.outcome import Outcome
from moeflow.sources import Texts, pin
from moeflow.sources.elsewhere import seen
from moeflow.step import Artifact, Resources, Step, placed, upstream
from moeflow.store import Store

if TYPE_CHECKING:
    from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
"""What the authors' own code computed; its README says how."""

SMALL = Path(__file__).parents[1] / "models" / "mixtral-small"
"""A Mixtral of 0.7 M parameters that was trained on Python; its README says how."""


def store_in(folder: Path) -> Store:
    return Store.open(str(folder / "store"))


def run(store: Store, *targets: Step) -> Outcome:
    return in_process.run([*targets, *(r for t in targets for r in t.reports)], store)


def read(store: Store, step: Step) -> Artifact:
    """What a step made, as the steps behind it read it."""
    return seen(store, step.key)


def copied(store: Store, step: Step, folder: Path) -> Path:
    """The files of what a step made, in a new folder, wherever they lie."""
    made = read(store, step)  # its own folder goes with it
    return Path(shutil.copytree(made.folder(), folder))


def tensors_of(store: Store, layer: Step) -> dict[str, "Tensor"]:
    """The tensors of a layer, wherever its file lies."""
    from safetensors.torch import load

    artifact = read(store, layer)
    return load(artifact.read(LAYER, 0, artifact.size(LAYER)))


def alone(step: Step) -> Step:
    """The same step, and what it needs, in this process: outside a gang."""
    return placed(step, lambda _: Resources())


def model_in(folder: Path, **options: Any) -> Model:
    return checkpoint.pinned(pin(str(folder), kind="model"), **options)


def matrix_of(folder: Path, *, sequences: int = 8, length: int = 16, vocabulary: int = 96, seed: int = 0) -> Texts:
    """A file of random tokens."""
    path = folder / f"tokens-{sequences}-{length}-{seed}.npy"
    np.save(path, np.random.default_rng(seed).integers(3, vocabulary, (sequences, length)))
    return Texts(str(path))


def choices(store: Store, target: Step) -> dict[int, dict[str, Any]]:
    """What was chosen for each layer on the way to a checkpoint."""
    made = [s for s in upstream([target]) if s.name == "prune.choose"]
    return {s.params["at"]: json.loads(store.artifact(s.key).file("choice.json").read_text()) for s in made}


def facts_of(folder: Path, step: str = "") -> dict[int, list[dict[str, Any]]]:
    """What a pulled checkpoint says was done to each of its layers, in order; only by the step of this name where one is given."""
    layers = json.loads((folder / "moeflow.json").read_text())["layers"]
    return {entry["layer"]: [d for d in entry["done"] if step in ("", d["step"])] for entry in layers}


def reports(store: Store, target: Step) -> dict[str, dict[str, Any]]:
    """The rows of all reports of a target, by name."""
    rows = [json.loads(store.artifact(r.key).file("report.json").read_text())["rows"] for r in target.reports]
    return {row["name"]: row for part in rows for row in part}


def array_of(matrix: Texts) -> np.ndarray:
    """The array in a token file."""
    return np.load(matrix.spec)
