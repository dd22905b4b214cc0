"""The form in which measurements are stored: `report.json`, rows of original against compressed, as `moeflow.report` shows them."""

import json
from typing import Any

from moeflow.step import Context

REPORT = "report.json"


def row(name: str, original: float | None, compressed: float | None, unit: str) -> dict[str, Any]:
    """One line of a report; None where a side was not measured."""
    return {"name": name, "original": original, "compressed": compressed, "unit": unit}


def write_report(context: Context, kind: str, rows: list[dict[str, Any]], *, notes: list[str] | None = None, **facts: Any) -> None:
    """Leave a report of one `kind`, with remarks and any further facts."""
    report = {"kind": kind, "columns": ["original", "compressed"], "rows": rows, "notes": notes or [], **facts}
    (context.out / REPORT).write_text(json.dumps(report, indent=1) + "\n")
