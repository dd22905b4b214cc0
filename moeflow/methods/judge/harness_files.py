"""The files and the data that a task of lm-evaluation-harness needs: found and pinned when the graph is built, placed when it runs.

A task of the harness's own keeps its files there, and its data set on the hub is pinned to a commit. One in a folder of the user's
is brought into the store whole: its file, those that it includes, the Python files beside it, and its data.
"""

import glob
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moeflow.methods.judge.harness_tasks import Leaf, own_folder

if TYPE_CHECKING:
    from moeflow.sources import Source

BUILDERS = ("json", "csv", "parquet", "text", "arrow", "pandas", "xml")
"""The names by which a task says that its data set is files, in which format."""


@dataclass(frozen=True)
class Needed:
    """What the step of a task is told: its file, what is changed in it, and where its data lies."""

    yaml: str  # within `files`, or within the harness's tasks
    files: "Source | None"
    changes: dict[str, Any]
    data: dict[str, Any]  # as in dataset_kwargs and dataset_path, with names within `files`
    notes: tuple[str, ...] = field(default=())


def needed(leaf: Leaf, commits: dict[str, str]) -> Needed:
    """The files and the data of a task. Raises ValueError for data that is not there.

    `commits`: those of data sets on the hub that were asked for already; new ones are added.
    """
    config = leaf.whole
    kwargs = dict(config.get("dataset_kwargs") or {})
    dataset, notes = str(config.get("dataset_path") or ""), []
    folder = leaf.path.parent
    data: dict[str, Any] = {}
    files: list[Path] = []
    if dataset in BUILDERS or not dataset:
        for key in ("data_files", "data_dir"):
            if key in kwargs:
                data[key] = _found(kwargs.pop(key), folder, leaf.name, files)
    elif (here := next((p for p in (folder / dataset, Path(dataset)) if p.exists()), None)) is not None:
        files += sorted(p for p in here.rglob("*") if p.is_file()) if here.is_dir() else [here]
        data["dataset_path"] = [str(here.absolute())]
    elif "revision" not in kwargs:
        try:
            commits[dataset] = kwargs["revision"] = commits.get(dataset) or _commit(dataset)
        except ValueError as error:
            if "/" in dataset:
                raise ValueError(f"the data set of the task {leaf.name} cannot be had: {error}") from None
            notes.append(f"the data set {dataset} of {leaf.name} has no owner in its name, so its revision is not pinned")
    changes = {**leaf.changes, **({"dataset_kwargs": kwargs} if kwargs or data else {})}
    if leaf.own and not files:
        return Needed(leaf.path.relative_to(own_folder()).as_posix(), None, changes, data, tuple(notes))
    every = [*_sources(leaf.path), *files]
    root = Path(os.path.commonpath([f.absolute().parent for f in every]))
    source = _pinned(root, every)
    inside = {key: _inside(value, root) for key, value in data.items()}
    return Needed(leaf.path.absolute().relative_to(root).as_posix(), source, changes, inside, tuple(notes))


def placed(changes: Mapping[str, Any], data: Mapping[str, Any], inside: Path | None, scratch: Path) -> dict[str, Any]:
    """The changes in a task's file, with its data where it lies now, in the folder `inside`; what is made of it is in `scratch`."""

    def at(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: at(one) for key, one in value.items()}
        return [one if "://" in one or inside is None else str(inside / one) for one in value]

    if not data:
        return {**changes}
    kwargs = {**changes.get("dataset_kwargs", {}), "cache_dir": str(scratch / "datasets")}
    kwargs |= {key: at(value) for key, value in data.items() if key != "dataset_path"}
    if "data_dir" in kwargs:
        (kwargs["data_dir"],) = kwargs["data_dir"]
    path = {"dataset_path": at(data["dataset_path"])[0]} if "dataset_path" in data else {}
    return {**changes, **path, "dataset_kwargs": kwargs}


def _found(value: Any, folder: Path, task: str, files: list[Path]) -> Any:
    """`data_files` with absolute paths. They are looked for beside the task's file and then in the current folder."""
    if isinstance(value, Mapping):
        return {key: _found(one, folder, task, files) for key, one in value.items()}
    paths: list[str] = []
    for one in value if isinstance(value, list) else [value]:
        if "://" in str(one):
            paths.append(str(one))
            continue
        places = [p for base in (folder, Path.cwd()) if (p := sorted(glob.glob(str(base / str(one)), recursive=True)))]
        if not places:
            raise ValueError(f"the task {task} reads {one}, which lies neither in {folder} nor in the current folder")
        files += [Path(p) for p in places[0] if Path(p).is_file()]
        files += [f for p in places[0] if Path(p).is_dir() for f in sorted(Path(p).rglob("*")) if f.is_file()]
        paths += places[0]
    return paths


def _inside(value: Any, root: Path) -> Any:
    """The same paths within a folder; addresses as they are."""
    if isinstance(value, Mapping):
        return {key: _inside(one, root) for key, one in value.items()}
    return [one if "://" in one else Path(one).absolute().relative_to(root).as_posix() for one in value]


class _Loader(yaml.SafeLoader):
    """Reads a task's file without importing the functions that it names."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: getattr(node, "value", ""))


def _sources(path: Path) -> list[Path]:
    """A task's file, the files that it includes, and the Python files beside each of them."""
    seen: list[Path] = []
    stack = [path.absolute()]
    while stack:
        if (one := stack.pop()) in seen:
            continue
        seen.append(one)
        try:
            include = (yaml.load(one.read_bytes(), _Loader) or {}).get("include", [])
        except (OSError, yaml.YAMLError, AttributeError) as error:
            raise ValueError(f"{one} cannot be read as a task: {' '.join(str(error).split())}") from None
        stack += [Path(os.path.normpath(one.parent / i)) for i in ([include] if isinstance(include, str) else include)]
    return [*seen, *sorted({p for folder in {one.parent for one in seen} for p in folder.glob("*.py")})]


def _pinned(root: Path, files: Sequence[Path]) -> "Source":
    """These files of a folder, as one source."""
    from moeflow.sources import Source, pin

    pinned = []
    for file in sorted({Path(os.path.normpath(f.absolute())) for f in files}):
        (one,) = pin(str(file), kind="data").files
        pinned.append(type(one)(file.relative_to(root).as_posix(), one.size, one.pin))
    return Source(root.as_posix(), "", tuple(pinned))


def _commit(dataset: str) -> str:
    """The commit of a data set on the hub now. Raises ValueError."""
    from moeflow.sources import pin

    with suppress(ValueError):  # one small question, where the data set has a page
        return pin(f"hf://datasets/{dataset}/README.md", kind="data").revision
    return pin(f"hf://datasets/{dataset}", kind="data").revision
