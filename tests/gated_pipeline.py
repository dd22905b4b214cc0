"""A pipeline for tests of gates: a number, with reports of a KL and of bytes that are given."""

import json
from typing import Any

from moeflow.cli import main
from moeflow.step import Context, Spec, Step, step
from tests.run import toy


@step("test.measured", version=1, spec=lambda rows: Spec(figures=tuple(_word(row) for row in rows)))
def measured(context: Context, *, rows: list[dict[str, Any]]) -> None:
    (context.out / "report.json").write_text(json.dumps({"kind": "quality", "columns": ["original", "compressed"], "rows": rows}))


def _word(row: dict[str, Any]) -> str:
    return f"{row['figure']}[{row['text']}]" if row.get("text") else str(row["figure"])


def build(*, kl: float = 0.01, size: int = 8, n: int = 1) -> Step:
    rows: list[dict[str, Any]] = [
        {"name": "KL", "unit": "nats/token", "original": 0.0, "compressed": kl, "figure": "kl", "text": "prose", "better": "lower"},
        {"name": "bytes", "unit": "B", "original": 100, "compressed": size, "figure": "bytes", "better": "lower"},
    ]
    return toy.total(toy.number(n=n), size=size).reporting(measured(rows=rows))


if __name__ == "__main__":
    main(build)
