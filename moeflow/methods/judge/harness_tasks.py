"""Which tasks of lm-evaluation-harness a name stands for, before anything runs. No torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from moeflow import options
from moeflow.methods.judge.options import YAML, Tasks, is_rows, names_of

MISSING = "tasks of lm-evaluation-harness need it here and on the workers: pip install 'moeflow[eval]'"


@dataclass(frozen=True)
class Leaf:
    """One task of the harness: its name, its file, and what of it is said otherwise."""

    name: str
    path: Path
    own: bool  # whether the file is one of the harness's
    config: Mapping[str, Any]
    changes: Mapping[str, Any]  # by the groups around it

    @property
    def whole(self) -> dict[str, Any]:
        return {**self.config, **self.changes}


@dataclass(frozen=True)
class Grouped:
    """A group whose figure is made of its tasks' figures."""

    name: str
    tasks: tuple[str, ...]
    aggregates: tuple[Mapping[str, Any], ...]


def version() -> str:
    """The harness's version, of which its own tasks are. Raises ValueError if it is not installed."""
    try:
        return metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise ValueError(MISSING) from None


def resolved(tasks: Tasks) -> tuple[list[Leaf], list[Grouped]]:
    """The tasks that are named, without files of rows, and the groups among them.

    Raises ValueError for a task that does not exist, one that runs what the model writes, one about pictures or sound, and a metric
    that no task has.
    """
    names = [name for name in names_of(tasks.names) if not is_rows(name)]
    if not names and tasks.metrics:
        raise ValueError(f"tasks.metrics={tasks.metrics} is for tasks of lm-evaluation-harness, and none is named; leave it away")
    if not names:
        return [], []
    version()
    leaves: dict[str, Leaf] = {}
    groups: dict[str, Grouped] = {}
    for name in names:
        local = name.endswith(YAML)
        path = Path(name).expanduser().absolute() if local else None
        index = _index(path.parent if path else _folder(tasks), own=not local)
        for leaf in _expanded(_named(index, path) if path else name, index, {}, groups, ()):
            if leaves.setdefault(leaf.name, leaf) != leaf:
                raise ValueError(f"tasks names {leaf.name} twice, by itself and in a group, or from two folders; leave one out")
    for leaf in leaves.values():
        _check(leaf, tasks)
    known = {str(m["metric"]) for leaf in leaves.values() for m in _metrics(leaf.whole)}
    if known and (strange := next((m for m in names_of(tasks.metrics) if m not in known), None)):
        raise ValueError(f"tasks.metrics={strange}: no task has this metric; {options.nearest(strange, sorted(known))}")
    return [*leaves.values()], [*groups.values()]


def _folder(tasks: Tasks) -> Path | None:
    return Path(tasks.folder).expanduser().absolute() if tasks.folder else None


def own_folder() -> Path:
    """The folder of the harness's own tasks."""
    spec = util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(MISSING)
    return Path(spec.submodule_search_locations[0]) / "tasks"


def _index(folder: Path | None, *, own: bool) -> Mapping[str, Any]:
    """The harness's index of tasks, groups and tags by name: those in the folder, which is read anew, over its own ones."""
    from lm_eval.tasks import TaskManager

    local = {} if folder is None else TaskManager(include_path=str(folder), include_defaults=False).task_index
    return {**_own_index(), **local} if own else local


@cache
def _own_index() -> Mapping[str, Any]:
    """The harness's own tasks; finding them takes it 13 seconds."""
    from lm_eval.tasks import TaskManager

    index: Mapping[str, Any] = TaskManager().task_index
    return index


def _named(index: Mapping[str, Any], path: Path) -> str:
    """The name of the task or group in a file. Raises ValueError if it holds none."""
    for name, entry in index.items():
        if entry.yaml_path is not None and entry.yaml_path.absolute() == path:
            return name
    raise ValueError(f"{path} is no task of lm-evaluation-harness; it needs at least `task:`, and valid YAML")


def _expanded(
    name: str, index: Mapping[str, Any], changes: Mapping[str, Any], groups: dict[str, Grouped], around: tuple[str, ...]
) -> Iterator[Leaf]:
    """The tasks that a name stands for, as the harness expands groups and tags; groups with a figure go to `groups`."""
    entry = index.get(name)
    if entry is None:
        within = f" (in the group {around[-1]})" if around else ""
        raise ValueError(f"the task {name} does not exist{within}; {_nearest(name, index)}")
    if name in around:
        raise ValueError(f"the group {name} is a part of itself; correct its file")
    kind, config = entry.kind.name, dict(entry.cfg or {})
    if kind == "TAG":
        for tagged in sorted(entry.tags):
            yield from _expanded(tagged, index, changes, groups, (*around, name))
    elif kind == "GROUP":
        fields = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag", "include"}
        merged = {**{k: v for k, v in config.items() if k not in fields}, **changes}
        leaves: list[Leaf] = []
        for member in config.get("task") or []:
            leaves += _member(member, index, merged, groups, (*around, name))
        if aggregates := config.get("aggregate_metric_list"):
            listed = aggregates if isinstance(aggregates, list) else [aggregates]
            groups[name] = Grouped(name, tuple(leaf.name for leaf in leaves), tuple(listed))
        yield from leaves
    else:
        path, own = Path(entry.yaml_path), Path(entry.yaml_path).is_relative_to(own_folder())
        yield Leaf(
            str(changes.get("task", name)), path, own, config, {k: v for k, v in changes.items() if k not in ("tag", "group")}
        )


def _member(
    member: Any, index: Mapping[str, Any], changes: dict[str, Any], groups: dict[str, Grouped], around: tuple[str, ...]
) -> list[Leaf]:
    if isinstance(member, str):
        return [*_expanded(member, index, changes, groups, around)]
    name = member.get("group") or member.get("task")
    if not isinstance(name, str) or name not in index:
        raise ValueError(f"the group {around[-1]} defines {name!r} within itself; give that task a file of its own")
    return [*_expanded(name, index, {**changes, **{k: v for k, v in member.items() if k not in ("group", "task")}}, groups, around)]


def _nearest(name: str, index: Mapping[str, Any]) -> str:
    """Advice for a task that does not exist: the nearest name, or where all are listed."""
    advice = options.nearest(name, index)
    return (
        advice
        if advice.startswith("did")
        else "`lm_eval ls tasks` lists those of the harness; a file of your own ends in .yaml or .jsonl"
    )


def _check(leaf: Leaf, tasks: Tasks) -> None:
    config = leaf.whole
    if config.get("unsafe_code") and not tasks.unsafe:
        raise ValueError(
            f"the task {leaf.name} runs what the model writes, without a sandbox; say tasks.unsafe=true if the workers may do so, "
            "or take a file of code and tests, which runs in one"
        )
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise ValueError(f"the task {leaf.name} is about pictures or sound, and only the text model is judged; leave it out")


def figures(leaf: Leaf) -> tuple[list[str], list[tuple[str, str]]]:
    """A task's metrics in its own order, and each of them with each way in which answers are found in texts ("" for one alone)."""
    metrics = [str(m["metric"]) for m in _metrics(leaf.whole)]
    filters = [str(f.get("name") or "") for f in leaf.whole.get("filter_list") or [{}]]
    return metrics, [(m, "" if f == "none" else f) for m in metrics for f in filters]


def _metrics(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a task measures; the harness's rule where it does not say."""
    if listed := config.get("metric_list"):
        return [m for m in listed if isinstance(m, Mapping)]
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    kind = str(config.get("output_type") or "generate_until")
    return [{"metric": name} for name in DEFAULT_METRIC_REGISTRY.get(kind, ())]
