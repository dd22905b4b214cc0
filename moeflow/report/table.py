"""The reports of a version as one table: the measurements that steps stored as `report.json`."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moeflow.sizes import bytes_text
from moeflow.store import Store

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


Extra = Callable[[Report, Mapping[str, Any]], str]
"""What one more column has for a row of a report."""


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


def table(reports: Iterable[Report], *, plain: bool = False, extra: Mapping[str, Extra] | None = None) -> Table:
    """One table of all reports: a section per kind, and their columns in the order in which they come.

    `extra`: more columns behind these, by their titles, with what each has for a row.
    """
    reports = [r for r in reports if r.rows]
    columns = list(dict.fromkeys(c for r in reports for c in r.columns))
    made = Table(box=None if plain else SIMPLE, pad_edge=False)
    made.add_column("")
    for column in columns:
        made.add_column(column, justify="right")
    for title in extra or {}:
        made.add_column(title)
    for kind in dict.fromkeys(r.kind for r in reports):
        rows = [(r, row) for r in reports if r.kind == kind for row in r.rows]
        for r, row in rows:
            more = [of_row(r, row) for of_row in (extra or {}).values()]
            made.add_row(*map(Text, (*words(row, columns), *more)), end_section=row is rows[-1][1])
    return made


def words(row: Mapping[str, Any], columns: Iterable[str]) -> list[str]:
    """One row as people read it: its name with the unit, and the values under these columns."""
    unit = str(row.get("unit", ""))
    return [titled(str(row["name"]), unit), *(shown(row.get(c), unit) for c in columns)]


def console(stream: TextIO | None = None) -> Console:
    """The console for tables, stdout by default; a pipe gets no colours, and is not cut at 80 columns."""
    stream = stream or sys.stdout
    return Console(file=stream) if stream.isatty() else Console(file=stream, width=PLAIN, no_color=True)


def titled(name: str, unit: str) -> str:
    """The name of a row, with its unit unless that is seen in its values."""
    return f"{name} [{unit}]" if unit and unit not in BYTES else name


def shown(value: Any, unit: str) -> str:
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
