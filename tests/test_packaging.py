"""An editable install, as `make setup` and the image make it, is found from any folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_clone_in_the_folder_that_python_is_started_in_is_no_empty_package(tmp_path: Path) -> None:
    """The clone is called moeflow, too; an import of its folder would succeed, and loading would say to upgrade transformers."""
    clone, wheels, site = tmp_path / "moeflow", tmp_path / "wheels", tmp_path / "site"
    for name in ("pyproject.toml", "README.md"):
        clone.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    shutil.copytree(ROOT / "moeflow", clone / "moeflow", ignore=shutil.ignore_patterns("__pycache__"))
    wheels.mkdir()
    build = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(wheels)], cwd=clone, capture_output=True, check=True)
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    code = f"import site; site.addsitedir({str(site)!r}); import moeflow; print(moeflow.__version__, moeflow.__file__)"
    bare = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == str(clone / "moeflow" / "__init__.py")
