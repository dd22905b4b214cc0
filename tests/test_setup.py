"""`make setup` on a machine that lacks something says what, in one line, and leaves nothing behind."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("bash", "cat", "cksum", "dirname", "awk", "df", "rm", "env")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A copy of what setup reads, under a name with a space, and a PATH with nothing but the simplest tools."""
    folder = tmp_path / "a clone"
    shutil.copytree(ROOT / "infra" / "autoload", folder / "infra" / "autoload")
    for name in ("infra/setup.sh", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(str(shutil.which(name)))
    return folder


def tool(folder: Path, name: str, says: str = "") -> None:
    path = folder.parent / "bin" / name
    path.write_text(f"#!/bin/sh\n{says}\n")
    path.chmod(0o755)


def setup(folder: Path) -> str:
    path = {"PATH": str(folder.parent / "bin"), "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run([folder / "infra" / "setup.sh"], capture_output=True, text=True, env=path)
    assert done.returncode == 2 and not (folder / ".venv").exists()
    (line,) = done.stderr.splitlines()
    return line


def test_a_missing_compiler_is_named(bare: Path) -> None:
    assert setup(bare) == "setup: no C++ compiler (c++, g++ or clang++); install one, on Debian: apt-get install g++"


def test_a_missing_python_is_named(bare: Path) -> None:
    tool(bare, "c++")
    tool(bare, "python3", "exit 1")
    assert setup(bare) == "setup: no Python 3.11 or newer; install one"


def test_a_full_disk_is_named(bare: Path) -> None:
    tool(bare, "c++")
    tool(bare, "python3")
    (bare.parent / "bin" / "df").unlink()
    tool(bare, "df", "echo head; echo 'disk 1 1 102400 1 /'")
    assert setup(bare).startswith("setup: 100 MiB of disk are free here, and 6,000 are needed")


def test_what_every_run_imports_is_compiled_once_also_where_the_environment_forbids_it(bare: Path) -> None:
    """Containers often set PYTHONDONTWRITEBYTECODE: then each process would compile two thousand modules again."""
    log = bare.parent / "log"
    venv = bare.parent / "venv-python"
    venv.write_text(f'#!/bin/sh\necho "${{PYTHONDONTWRITEBYTECODE-may write}}: $*" >>"{log}"\n')
    venv.chmod(0o755)
    for name in ("mkdir", "ln"):
        (bare.parent / "bin" / name).symlink_to(str(shutil.which(name)))
    tool(bare, "c++")
    tool(bare, "python3", f'[ "$2" = venv ] || exit 0\nmkdir -p .venv/bin && ln -s "{venv}" .venv/bin/python')
    (bare.parent / "bin" / "df").unlink()
    tool(bare, "df", "echo head; echo 'disk 1 1 10240000 10240000 /'")
    path = {"PATH": str(bare.parent / "bin"), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([bare / "infra" / "setup.sh"], env=path, check=True)
    installed, compiled = log.read_text().splitlines()
    assert installed.startswith("1: -m pip install")
    assert compiled.startswith("may write: -c import ") and "moeflow.model.passes" in compiled
