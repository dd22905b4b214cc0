"""The worked examples of CONTRIBUTING.md: each is one new file and one new row, and then a pipeline uses it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

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


def tree(folder: Path) -> Path:
    """A copy of the product under version control."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "before")
    return folder


def run(folder: Path, *commands: str, params: tuple[str, ...] = ()) -> str:
    """What commands `moeflow run FILE ...` print when they are run in this tree, one after another in one process."""
    more = [w for param in params for w in ("-p", param)] + ["--store", str(folder.parent / "store")]
    lines = [["run", *shlex.split(command), *more] for command in commands]
    code = f"from moeflow.cli import app\nfor words in {lines}: app(words, standalone_mode=False)"
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def changed(folder: Path) -> str:
    """`git diff --stat` of the product's files."""
    git(folder, "add", "-AN")
    return git(folder, "diff", "--stat", "--", "moeflow", ":!**/__pycache__/**")


def add(example: Example, folder: Path) -> None:
    assert not (folder / example.file).exists()
    (folder / example.file).write_text(example.code)
    table = folder / example.where
    before, head, after = table.read_text().partition(f"\n{example.table} = {{\n")
    assert head, f"{example.where} has no table {example.table}"
    table.write_text(before + head + example.row + after)


def test_a_method_is_one_new_file_and_one_new_row(tmp_path: Path) -> None:
    folder = tree(tmp_path / "tree")
    for example in EXAMPLES:
        add(example, folder)
        assert re.search(r"\b2 files changed\b", changed(folder)), example.title
        assert git(folder, "diff", "--numstat", "--", example.where).split()[:2] == [str(example.row.count("\n")), "0"]
        git(folder, "commit", "-qam", example.title)
    source, matrix = tiny.write("mixtral", tmp_path / "model"), running.matrix_of(tmp_path)
    printed = run(folder, *(e.command for e in EXAMPLES), params=(f"model={source}", f"tokens={matrix.spec}", *SMALL))
    assert printed.count("in " + str(tmp_path / "store")) == len(EXAMPLES)
    assert all(name in printed for name in ("mixtral@1", "mixtral@2", "mixtral_unified@1"))


def test_a_verb_changes_no_file_that_there_is(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("A whole verb, small")[2]
    files = dict(re.findall(r"`(\S+\.py)`\n\n```python\n(.*?)```", text, re.DOTALL))
    (command,) = re.findall(r"    moeflow run (pipelines/averaged.py .*?)\n", text)
    folder = tree(tmp_path / "tree")
    for name, code in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    source = tiny.write("mixtral", tmp_path / "model")
    run(folder, command.replace("FOLDER", shlex.quote(str(source))))
    assert re.search(r"\b1 file changed\b.* insertions", changed(folder)) and "deletion" not in changed(folder)
