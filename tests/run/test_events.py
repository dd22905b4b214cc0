"""A run as events: one JSON object a line, and last the line that says what was made."""

import io
import json
from pathlib import Path

from typer.testing import CliRunner

from moeflow.cli import app
from moeflow.run.events import Events

TOY = Path(__file__).parents[1] / "toy_pipeline.py"


def test_a_run_with_json_streams_its_events_and_ends_with_what_was_made(tmp_path: Path) -> None:
    words = ["run", str(TOY), "--store", str(tmp_path / "store"), "--json", "-p", "numbers=2"]
    done = CliRunner().invoke(app, words)
    *events, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert {*last} == {"key", "name", "version", "steps", "seconds"} and last["steps"] == {"run": 6, "stored": 0}
    assert events[0]["event"] == "begin" and (events[0]["steps"], events[0]["todo"], events[0]["stored"]) == (6, 6, 0)
    assert [e["event"] for e in events].count("finish") == [e["event"] for e in events].count("start") == 6
    assert all(e["id"].startswith(e["step"].split()[0]) for e in events if e["event"] in ("start", "finish"))
    assert (events[-1]["event"], events[-1]["run"]) == ("end", 6) and all(e["at"] > 1.7e9 for e in events)
    again = [json.loads(line) for line in CliRunner().invoke(app, words).stdout.splitlines()]
    assert [e.get("event") for e in again] == ["begin", "end", None]


def test_an_error_is_the_last_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["run", str(TOY), "--store", str(tmp_path / "store"), "--json", "-p", "fail=true"])
    *events, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 1 and last["exit"] == 1 and events[0]["event"] == "begin"


def test_progress_of_a_step_is_told_only_now_and_then_and_remarks_go_to_people_too() -> None:
    now, out, remarks = [0.0], io.StringIO(), io.StringIO()
    events = Events(out, remarks, clock=lambda: now[0], quiet=5)
    events.start("toy.one-0")
    for second in range(12):
        now[0] = second
        events.progress("toy.one-0", second, 12, "tokens")
    events.note("toy.one-0", "a \x1b[31mremark")
    told = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [e["done"] for e in told if e["event"] == "progress"] == [5, 10]
    assert told[-1]["text"] == "a \x1b[31mremark" and remarks.getvalue() == "toy.one: a \\x1b[31mremark\n"
