"""How measurements are stored: `report.json`, with rows that compare original and compressed, which `moeflow.report` shows."""

import json
from typing import Any

from moeflow.step import Context


def row(name: str, original: float | None, compressed: float | None, unit: str) -> dict[str, Any]:
    """One row of a report; a model that was not measured has None."""
    return {"name": name, "original": original, "compressed": compressed, "unit": unit}


def write_report(context: Context, kind: str, rows: list[dict[str, Any]], *, note: str = "", **facts: Any) -> None:
    """Write `report.json`: rows of one `kind`, with a note and any further facts."""
    report = {"kind": kind, "columns": ["original", "compressed"], "rows": rows, "notes": [note] if note else [], **facts}
    (context.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
