"""Stored reports as one table."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.table import Table

from moeflow.report import console, read, table
from moeflow.run import in_process
from moeflow.step import Context, Step, step
from moeflow.store import Store
from tests.report.reporting import report


@step("evaluate.silent", version=1)
def silent(context: Context) -> None:
    (context.out / "other").write_text("")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


def shown(made: Table) -> list[list[str]]:
    """The table as text, cells by row."""
    stream = io.StringIO()
    console(stream).print(made)
    return [[cell for cell in line.split("  ") if cell.strip()] for line in stream.getvalue().splitlines()]


def cells(store: Store, *steps: Step) -> list[list[str]]:
    in_process.run(steps, store)
    rows = shown(table(read(store, [s.key for s in steps]), plain=True))
    return [[cell.strip() for cell in row] for row in rows]


def test_reports_are_merged_side_by_side(store: Store) -> None:
    quality = report("quality", ("perplexity", 12.345678, 13.0, ""))
    size = report("size", ("parameters", 21_000_000, 15_500_000, ""), ("bytes", 3 << 30, 2 << 30, "bytes"))
    speed = report("speed", ("prefill", 1234.5, 2345.6, "tokens/s"))
    assert cells(store, quality, size, speed) == [
        ["original", "compressed"],
        ["perplexity", "12.35", "13"],
        ["parameters", "21,000,000", "15,500,000"],
        ["bytes", "3.0 GiB", "2.0 GiB"],
        ["prefill [tokens/s]", "1,234.5", "2,345.6"],
    ]


def test_what_was_not_measured_is_a_dash(store: Store) -> None:
    assert cells(store, report("quality", ("KL to the original", None, 0.0123, "")))[1] == ["KL to the original", "-", "0.0123"]


def test_reports_with_other_columns_share_the_table(store: Store) -> None:
    one = report("quality", ("perplexity", 1.5, 2.5, ""))
    two = report("criteria", ("loss", 3.5, 4.5, ""), columns=["random", "frequency"])
    rows = cells(store, one, two)
    assert rows[0] == ["original", "compressed", "random", "frequency"]
    assert rows[2] == ["loss", "-", "-", "3.5", "4.5"]


def test_a_step_without_a_report_is_passed_over(store: Store) -> None:
    steps = [silent(), report("quality", ("perplexity", 1.5, 2.5, ""))]
    in_process.run(steps, store)
    assert [r.kind for r in read(store, [s.key for s in steps])] == ["quality"]


def test_a_report_as_json_is_what_was_stored(store: Store) -> None:
    made = report("quality", ("perplexity", 1.5, 2.5, ""), notes=("on 64 sequences",))
    in_process.run([made], store)
    (stored,) = read(store, [made.key])
    assert json.loads(json.dumps(asdict(stored))) == {"key": made.key, **made.params["report"]}


def test_a_pipe_gets_plain_text_in_one_piece(store: Store) -> None:
    made = report("quality", ("a name so long that eighty columns could not hold it and its values, which is long", 1.5, 2.5, ""))
    in_process.run([made], store)
    stream = io.StringIO()
    console(stream).print(table(read(store, [made.key]), plain=True))
    assert "\x1b" not in stream.getvalue() and "which is long" in stream.getvalue().splitlines()[1]
