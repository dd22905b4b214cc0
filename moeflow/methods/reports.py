"""How measurements are stored: `report.json`, with rows that compare original and compressed, which `moeflow.report` shows."""

import json
from typing import Any

from moeflow.step import Context


def row(name: str, original: float | None, compressed: float | None, unit: str, **about: Any) -> dict[str, Any]:
    """One row of a report; a model that was not measured has None.

    `about` is what is known besides, as `moeflow.report.figures.Figure` has it: figure (the word by which a gate names it), text,
    better, interval, change_interval, chance, items, wins and losses; None and "" are left out. A step names the figures that it
    will report in its spec, too (`Spec.figures`), so that a gate can be refused before the run.
    """
    known = {k: v for k, v in about.items() if v is not None and v != ""}
    return {"name": name, "original": original, "compressed": compressed, "unit": unit} | known


def figures(*names: str, text: str) -> tuple[str, ...]:
    """The figures of one text, for `Spec.figures`: "kl[prose]"."""
    return tuple(f"{name}[{text}]" for name in names)


def write_report(context: Context, kind: str, rows: list[dict[str, Any]], *, note: str = "", **facts: Any) -> None:
    """Write `report.json`: rows of one `kind`, with a note and any further facts."""
    report = {"kind": kind, "columns": ["original", "compressed"], "rows": rows, "notes": [note] if note else [], **facts}
    (context.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
