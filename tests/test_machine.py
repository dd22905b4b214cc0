"""What moeflow knows of the machine: its compiler, and paths with white space in them, which other programs cannot bear."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeflow.machine import compiler, without_spaces
from moeflow.methods.finetune import extensions
from moeflow.run.plan import plan
from moeflow.step import Context, Spec, step
from moeflow.store import Store

ROOT = Path(__file__).parents[1]


@step("test.compiled", version=1, spec=lambda: Spec(compiles=True))
def compiled(context: Context) -> None:
    """Would compile what it runs."""


@pytest.fixture
def spaced(tmp_path: Path) -> Iterator[Path]:
    """This environment's Python by a path with a space, as in a clone under such a name."""
    folder = tmp_path / "a place"
    folder.mkdir()
    (folder / ".venv").symlink_to(sys.prefix)
    yield folder / ".venv" / Path(sys.executable).relative_to(sys.prefix)
    without_spaces(folder / ".venv").unlink()


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH without a compiler."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "ninja", "sh"):
        if there := shutil.which(name):
            (tools / name).symlink_to(there)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tools


def environment(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)} | more


def test_a_folder_without_spaces_is_itself_and_one_with_some_has_a_link_that_follows_it(tmp_path: Path) -> None:
    assert without_spaces(tmp_path) == tmp_path
    folder = tmp_path / "a\tplace of mine"
    folder.mkdir()
    link = without_spaces(folder)
    try:
        assert not any(c.isspace() for c in str(link)) and link.resolve() == folder.resolve()
        assert without_spaces(folder) == link
        link.unlink()
        link.symlink_to(tmp_path)
        assert without_spaces(folder) == link and link.resolve() == folder.resolve(), "a link that led elsewhere is set right"
    finally:
        link.unlink()


@pytest.mark.parametrize("way", ["a pipeline by itself", "the command"])
def test_a_command_whose_python_lies_at_a_path_with_spaces_runs_by_one_without(way: str, spaced: Path, tmp_path: Path) -> None:
    file = tmp_path / "where.py"
    file.write_text(
        "import sys\nfrom moeflow.cli import main\nfrom tests.run import toy\n"
        "def build(n: int = 6):\n    print(sys.prefix, sys.executable, sep='|')\n    return toy.half(toy.number(n=n))\n"
        "if __name__ == '__main__':\n    main(build)\n"
    )
    head = [str(file)] if way == "a pipeline by itself" else ["-c", "from moeflow.cli import main; main()", "run", str(file)]
    words = [str(spaced), *head, "-p", "n=8", "--store", str(tmp_path / "store")]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    prefix, python = done.stdout.splitlines()[0].split("|")
    assert " " not in prefix + python and Path(prefix).samefile(sys.prefix)


@pytest.mark.slow
def test_extensions_compile_from_and_into_paths_with_spaces(spaced: Path, tmp_path: Path) -> None:
    place = tmp_path / "my cache"
    code = (
        "from moeflow.machine import restart_without_spaces\nrestart_without_spaces()\n"
        "from moeflow.methods.finetune import extensions\nextensions.load(extensions.COMMUNICATION)\n"
    )
    words = environment(TORCH_EXTENSIONS_DIR=str(place), DS_ACCELERATOR="cpu")
    done = subprocess.run([str(spaced), "-c", code], env=words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(place.rglob("*.so"))


def test_a_missing_compiler_is_told_by_plan_where_the_step_would_run_and_by_the_step_itself(bare: Path, tmp_path: Path) -> None:
    assert compiler() is None
    target, store = compiled(), Store.open(str(tmp_path / "store"))
    (problem,) = plan([target], store, memory=1 << 40).problems
    assert problem.startswith("test.compiled: there is no C++ compiler (c++, g++, clang++") and problem.endswith(
        "apt-get install g++"
    )
    assert not plan([target], store).problems, "a cluster's nodes may have one"
    with pytest.raises(ValueError, match=r"there is no C\+\+ compiler .*apt-get install g\+\+") as refused:
        extensions.load(extensions.COMMUNICATION)
    assert "\n" not in str(refused.value)
    (bare / "clang++").symlink_to(shutil.which("true", path=os.defpath) or "/bin/true")
    assert compiler() == "clang++" and not plan([target], store, memory=1 << 40).problems


def test_what_a_compiler_complains_of_is_one_line(bare: Path) -> None:
    broken = bare / "c++"
    asked = 'case "$1" in --version|-v|-dumpfullversion) echo "c++ 12.2.0"; exit 0;; esac\n'
    broken.write_text(f"#!/bin/sh\n{asked}echo 'a long story' >&2\necho 'x.h: fatal error: none' >&2\nexit 1\n")
    broken.chmod(0o755)
    # in a process of its own, because this one may have loaded the extension already
    code = "from moeflow.methods.finetune import extensions; extensions.load(extensions.COMMUNICATION)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode and len(line) < 500
    assert re.fullmatch(r"ValueError: .*c\+\+ cannot compile DeepSpeed's .*: x.h: fatal error: none; TORCH_.*", line), done.stderr
