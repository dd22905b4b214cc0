"""A wheel of this tree, installed into environments of their own, with nothing beside it but what it asks for.

Nothing is fetched: the packages that a requirement names, and what these require in turn, are linked from the environment that the
tests run in. So an import that no requirement covers fails as it would anywhere else.
"""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
OF_A_WHEEL = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "moeflow", "pipelines", "infra")


def clone(folder: Path) -> Path:
    """A copy of what a wheel is made of."""
    folder.mkdir(parents=True)
    for name in OF_A_WHEEL:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def built(tree: Path, into: Path, kind: str = "build_wheel") -> Path:
    """The wheel that setuptools builds of a tree; `kind`: also "build_editable"."""
    into.mkdir(parents=True, exist_ok=True)
    build = f"import sys; from setuptools.build_meta import {kind}; {kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(into)], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = into.glob("*.whl")
    return wheel


class Installed:
    """An environment with a wheel and, of its extras, the packages that these name."""

    def __init__(self, wheel: Path, folder: Path, extra: str = "") -> None:
        venv.create(folder, symlinks=True, with_pip=False)
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")
        zipfile.ZipFile(wheel).extractall(self.site)
        self.packages = sorted(_closure(self.site, extra))
        for name in self.packages:
            _link(name, self.site)

    def run(self, *words: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Python with these words, and nothing of this process's own paths."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
        return subprocess.run(
            [str(self.python), *words], cwd=cwd, env=kept | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    def moeflow(self, *words: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
        """The command, by the entry point that the wheel names."""
        entries = metadata.Distribution.at(next(self.site.glob("moeflow-*.dist-info"))).entry_points
        (entry,) = entries.select(group="console_scripts", name="moeflow")
        code = f"import sys; sys.argv[0] = 'moeflow'; from {entry.module} import {entry.attr} as main; main()"
        return self.run("-c", code, *words, cwd=cwd, **environment)


def _closure(site: Path, extra: str) -> set[str]:
    """The names of everything that the wheel with this extra requires, and what that requires."""
    (info,) = site.glob("moeflow-*.dist-info")
    wheel = metadata.Distribution.at(info)
    todo: list[tuple[str, frozenset[str]]] = [("moeflow", frozenset({extra}))]
    done: set[tuple[str, frozenset[str]]] = set()
    while todo:
        name, extras = one = todo.pop()
        if one in done:
            continue
        done.add(one)
        of = wheel if name == "moeflow" else metadata.distribution(name)
        for line in of.requires or ():
            wanted = Requirement(line)
            if wanted.marker is None or any(wanted.marker.evaluate({"extra": e}) for e in (extras or {""}) | {""}):
                todo.append((canonicalize_name(wanted.name), frozenset(wanted.extras)))
    return {name for name, _ in done} - {"moeflow"}


def _link(name: str, site: Path) -> None:
    """Link everything that a distribution has installed beside other packages."""
    of = metadata.distribution(name)
    tops = {file.parts[0] for file in of.files or () if file.parts[0] not in ("..", "__pycache__")}
    for top in tops:
        target, link = Path(str(of.locate_file(top))), site / top
        if (link.is_dir() and not link.is_symlink()) or (
            link.is_symlink() and target.is_dir() and link.resolve() != target.resolve()
        ):
            raise AssertionError(f"{name} shares {top} with another package")
        if not link.exists():
            link.symlink_to(target)
