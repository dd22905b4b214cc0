"""The reports of a version as one table: the measurements that steps stored as `report.json`."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moeflow.store import Store
from moeflow.store.errors import bytes_text

FILE = "report.json"
BYTES = ("bytes", "B")  # units that are shown as sizes
PLAIN = 200  # width of the text if the output is no terminal


@dataclass(frozen=True)
class Report:
    """One stored report: rows of values under `columns`, such as original and compressed."""

    key: str
    kind: str
    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]


def read(store: Store, keys: Iterable[str]) -> tuple[Report, ...]:
    """The reports of these steps, in this order; a step without one is skipped. Raises NotStored."""
    reports = []
    for key, raw in raw_reports(store, keys):
        columns, rows, notes = (tuple(raw.get(name, ())) for name in ("columns", "rows", "notes"))
        reports.append(Report(key, raw.get("kind", ""), columns, rows, notes))
    return tuple(reports)


def raw_reports(store: Store, keys: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The reports of these steps as they are stored, with all facts, each with its key. Raises NotStored."""
    for key in keys:
        artifact = store.artifact(key)
        if FILE in artifact.names():
            yield key, json.loads(artifact.file(FILE).read_text())


def table(reports: Iterable[Report], *, plain: bool = False) -> Table:
    """One table of all reports: a section per kind, and their columns in the order in which they come."""
    reports = [r for r in reports if r.rows]
    columns = list(dict.fromkeys(c for r in reports for c in r.columns))
    made = Table(box=None if plain else SIMPLE, pad_edge=False)
    made.add_column("")
    for column in columns:
        made.add_column(column, justify="right")
    for kind in dict.fromkeys(r.kind for r in reports):
        rows = [row for r in reports if r.kind == kind for row in r.rows]
        for row in rows:
            unit = str(row.get("unit", ""))
            words = [_value(row.get(c), unit) for c in columns]
            made.add_row(_name(str(row["name"]), unit), *words, end_section=row is rows[-1])
    return made


def console(stream: TextIO | None = None) -> Console:
    """The console for tables, stdout by default; a pipe gets no colours, and is not cut at 80 columns."""
    stream = stream or sys.stdout
    return Console(file=stream) if stream.isatty() else Console(file=stream, width=PLAIN, no_color=True)


def _name(name: str, unit: str) -> str:
    return f"{name} [{unit}]".replace("[", r"\[") if unit and unit not in BYTES else name.replace("[", r"\[")


def _value(value: Any, unit: str) -> str:
    """A number as people read it; a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if unit in BYTES:
        return bytes_text(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
