"""docs/engines.md: its table is the table, and its commands work."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moeflow.engines import ENGINES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "engines.md").read_text()
COMMANDS = [shlex.split(c.replace("\\\n", " ")) for c in re.findall(r"^    moeflow (.*?)\n\n", PAGE, re.DOTALL | re.MULTILINE)]


@pytest.mark.parametrize("name", ENGINES)
def test_the_table_of_the_page_is_that_of_the_code(name: str) -> None:
    (row,) = [line for line in PAGE.splitlines() if re.match(rf"\| `{re.escape(name)}`[ |]", line)]
    counts, ranks, others, bits, memory = (cell.strip() for cell in row.split("|")[2:7])
    engine = ENGINES[name]
    assert [cell == "yes" for cell in (counts, ranks, others)] == [engine.counts, engine.ranks, engine.gone and engine.routing]
    assert [int(b) for b in re.match(r"[\d, ]*\d", bits)[0].split(",")] == [*engine.bits]  # type: ignore[index]
    assert ("may differ" in bits) == engine.mixed and memory.startswith("unpacked") == engine.unpacks


@pytest.mark.parametrize("words", [pytest.param(c, id=c[0], marks=[pytest.mark.slow] * (c[0] == "fit")) for c in COMMANDS])
def test_a_command_of_the_page_works(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from moeflow.cli import main; main()", *words, "--json", "--store", str(tmp_path / "store")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["key"]
