"""Where a stored artifact came from, as text: its parameters, everything upstream, libraries and sources."""

import json
from collections import defaultdict
from collections.abc import Mapping

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from moeflow.sizes import bytes_text
from moeflow.store import Manifest

COLUMNS = ("step", "version", "keys", "bytes", "seconds", "source", "parameters")


def parameters(manifest: Manifest) -> list[str]:
    """The parameters of the step that made it, and its notes, one a line."""
    params = [f"{name} = {_cut(json.dumps(value, sort_keys=True))}" for name, value in manifest.params.items()]
    lines = [f"{'parameters' if n == 0 else '':<11}{param}" for n, param in enumerate(params)]
    return lines + [f"{'notes' if n == 0 else '':<11}{note}" for n, note in enumerate(manifest.notes)]


def step_rows(lineage: Mapping[str, Manifest], *, every: bool = False) -> list[tuple[str, ...]]:
    """Everything upstream, a row for each step name, or with `every` for each key: the cells under `COLUMNS`."""
    groups: dict[tuple[str, int, str], list[Manifest]] = defaultdict(list)
    for manifest in lineage.values():
        groups[(manifest.step, manifest.version, manifest.key if every else "")].append(manifest)
    rows: list[tuple[str, ...]] = []
    for (name, version, key), group in groups.items():
        keys = key or (group[0].key if len(group) == 1 else f"{len(group):,}")
        size, seconds = bytes_text(sum(m.bytes for m in group)), f"{sum(m.seconds for m in group):.1f}"
        sources = " ".join(sorted({m.source[:8] for m in group}))
        rows.append((name, str(version), keys, size, seconds, sources, _cut(_params(group), 64)))
    return rows


def steps(lineage: Mapping[str, Manifest], *, every: bool = False, plain: bool = False) -> Table:
    """A table of everything upstream, with a line per step name, or with `every` per key."""
    rows = step_rows(lineage, every=every)
    made = Table(box=None if plain else SIMPLE, pad_edge=False)
    for at, title in enumerate(COLUMNS[:-1]):
        title = "key" if title == "keys" and every else title
        widest = max(len(title), *(len(row[at]) for row in rows))
        made.add_column(title, min_width=widest, no_wrap=True, justify="right" if title in ("bytes", "seconds") else "left")
    made.add_column(COLUMNS[-1], overflow="ellipsis", no_wrap=True)
    for row in rows:
        made.add_row(*row[:-1], Text(row[-1]))
    return made


def libraries(lineage: Mapping[str, Manifest]) -> dict[str, list[str]]:
    """The versions of each library that was used; several if steps ran at different times."""
    used: dict[str, set[str]] = defaultdict(set)
    for manifest in lineage.values():
        for name, version in manifest.libraries.items():
            used[name].add(version)
    return {name: sorted(versions) for name, versions in sorted(used.items())}


def _params(group: list[Manifest]) -> str:
    """The parameters that are the same in the whole group, and the names of those that differ."""
    same: list[tuple[str, str]] = []
    differ: list[tuple[str, str]] = []
    for name in dict.fromkeys(n for m in group for n in m.params):
        values = {json.dumps(m.params.get(name), sort_keys=True) for m in group}
        (same if len(values) == 1 else differ).append((name, next(iter(values))))
    words = [f"{name}={_cut(text)}" for name, text in same] + [f"{name}=..." for name, _ in differ]
    return " ".join(words)


def _cut(text: str, length: int = 100) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
