"""The commands of docs/evaluate.md run as they stand there, and their reports have what the page says."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = re.findall(r"^ +moeflow (run .*?)\n\n", (ROOT / "docs" / "evaluate.md").read_text(), re.DOTALL | re.MULTILINE)
FIELDS = {"figure", "interval", "change_interval", "items"}


def moeflow(*words: str) -> str:
    command = [sys.executable, "-c", "from moeflow.cli import main; main()", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(command: str, store: Path, *more: str) -> dict[str, dict[str, Any]]:
    """The rows that a command's reports have, by figure."""
    moeflow(*shlex.split(command.replace("\\\n", " ")), "--store", str(store), *more)
    shown = json.loads(moeflow("show", "mixtral", "--json", "--store", str(store)))
    return {row["figure"]: row for report in shown["reports"] for row in report["rows"] if "figure" in row}


@pytest.mark.slow
def test_what_the_page_says_of_files_of_rows_and_prompts_is_reported_and_a_gate_may_ask_for_it(tmp_path: Path) -> None:
    found = rows(COMMANDS[0], tmp_path / "store", "--gate", "code>=0.5", "--gate", "greedy_prefix[prompts]>=1")
    for figure in ("numbers", "code", "calls", "greedy_prefix", "sampled_prefix", "length", "repetition"):
        assert {*found[figure]} >= FIELDS, figure
    for figure in ("numbers", "code", "calls"):
        assert found[figure]["original"] > 0.5 and {"wins", "losses", "better"} <= {*found[figure]}


@pytest.mark.slow
def test_what_the_page_says_of_the_harness_is_reported(tmp_path: Path) -> None:
    found = rows(COMMANDS[1], tmp_path / "store", "--gate", "python>=0.8x")
    for figure in ("closing", "order", "order.acc_norm", "python"):
        assert FIELDS | {"chance", "wins", "losses"} <= {*found[figure]} and found[figure]["chance"] == 0.25


def test_the_commands_of_the_page_are_planned() -> None:
    assert len(COMMANDS) == 2
    words = shlex.split(COMMANDS[0].replace("\\\n", " "))
    planned = moeflow("plan", *words[1:], "--store", "none", "--json")
    assert {"judge.of_rows", "judge.of_prompts", "judge.compared", "judge.prompts"} <= {*re.findall(r"judge\.\w+", planned)}
