"""The worked examples of CONTRIBUTING.md: each is one new file and one new row, and then a pipeline uses it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import running, tiny

ROOT = Path(__file__).parents[1]
COPIED = ("moeflow", "pipelines", "pyproject.toml")
SMALL = ["calibration.sequences=8", "calibration.length=16", "calibration.batch=2", "heldout.sequences=2", "heldout.length=16"]


class Example(NamedTuple):
    title: str
    file: str
    code: str
    table: str
    where: str
    row: str
    command: str


PATTERN = (
    r"### (.+?)\n\n`(\S+\.py)`\n\n```python\n(.*?)```\n\n"
    r"A row of `(\w+)` in `(\S+)`:\n\n```python\n(.*?)```\n\n    moeflow run (.*?)\n"
)
EXAMPLES = [Example(*parts) for parts in re.findall(PATTERN, (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)]


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_there_is_an_example_of_each_kind() -> None:
    assert [e.table for e in EXAMPLES] == ["SCORES", "SUBSET_SEARCHES", "METHODS"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.title)
def test_a_method_is_one_new_file_and_one_new_row(example: Example, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "before")
    assert not (tree / example.file).exists()
    (tree / example.file).write_text(example.code)
    table = tree / example.where
    before, head, after = table.read_text().partition(f"\n{example.table} = {{\n")
    assert head, f"{example.where} has no table {example.table}"
    table.write_text(before + head + example.row + after)

    source, matrix = tiny.write("mixtral", tmp_path / "model"), running.matrix_of(tmp_path)
    file, *words = shlex.split(example.command)
    words += [w for given in (f"model={source}", f"tokens={matrix.spec}", *SMALL) for w in ("-p", given)]
    done = subprocess.run(
        [sys.executable, file, *words, "--store", str(tmp_path / "store")],
        cwd=tree, env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "expert bytes" in done.stdout

    shutil.rmtree(tree / ".moeflow", ignore_errors=True)
    git(tree, "add", "-AN")
    changed = git(tree, "diff", "--stat", "--", "moeflow", ":!**/__pycache__")
    assert re.search(r"\b2 files changed\b", changed), changed
    assert git(tree, "diff", "--numstat", "--", example.where).split()[:2] == [str(example.row.count("\n")), "0"]
