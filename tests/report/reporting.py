"""Steps that store the report that they are given."""

import json
from typing import Any

from moeflow.step import Context, Step, step

ORIGINAL = ["original", "compressed"]


@step("evaluate.told", version=1)
def reported(context: Context, *, report: dict[str, Any]) -> None:
    (context.out / "report.json").write_text(json.dumps(report))


def report(kind: str, *rows: tuple[str, Any, Any, str], columns: list[str] = ORIGINAL, notes: tuple[str, ...] = ()) -> Step:
    made = [{"name": name, columns[0]: one, columns[1]: two, "unit": unit} for name, one, two, unit in rows]
    return reported(report={"kind": kind, "columns": columns, "rows": made, "notes": list(notes)})
