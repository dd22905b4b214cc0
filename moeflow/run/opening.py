"""How a run's words about stores, times and pipelines are read, for the command line and for Python alike."""

import re
from os import PathLike, fspath
from pathlib import Path

import moeflow
from moeflow.store import LocalBlobs, Store

STORE = ".moeflow/store"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def open_store(url: str, patience: float = 0.0) -> Store:
    """Open and check a store that will be written to. Raises StoreError."""
    store = Store.open(url or STORE, patience=patience)
    store.check()
    return store


def reading(url: str) -> Store:
    """Open a store that must exist. Raises FileNotFoundError."""
    store = Store.open(url or STORE)
    if isinstance(store.blobs, LocalBlobs) and not store.blobs.root.is_dir():
        raise FileNotFoundError(f"there is no store {store.url}; pass --store, or run a pipeline")
    return store


def seconds(option: str, text: str) -> float:
    """A time like 15m as seconds. Raises ValueError with the option's name."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)):
        raise ValueError(f"{option} {text}: write a number and s, m, h or d, as in 7d")
    return float(match[1]) * UNITS[match[2]]


def shipped() -> dict[str, Path]:
    """The pipelines that come with moeflow, by name: in a wheel they lie inside the package, in a clone beside it."""
    package = Path(moeflow.__file__).parent
    inside = package / "pipelines"
    folder = inside if inside.is_dir() else package.parent / "pipelines"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def pipeline_file(word: str | PathLike[str]) -> Path:
    """The file of a pipeline: that of one that comes with moeflow, by its name, or else the file with this path."""
    return shipped().get(fspath(word)) or Path(word)
