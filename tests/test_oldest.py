"""The oldest transformers and compressed-tensors of the ranges in pyproject.toml: they load and save all that is moeflow's own."""

import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PINS = ROOT / "constraints-oldest.txt"
FORMS = (
    "tests/model/test_compressed.py", "tests/methods/slim/test_factors.py", "tests/methods/slim/test_loading.py",
    "tests/engines/test_stock.py",
)  # fmt: skip
"""The tests that load every form: differing counts, factors, skipping, Compressed Experts, missing blocks, packed ones."""


def pins() -> dict[str, Requirement]:
    lines = [line for line in PINS.read_text().splitlines() if line and not line.startswith("#")]
    return {one.name: one for one in map(Requirement, lines)}


def test_the_oldest_releases_are_the_ends_of_the_ranges() -> None:
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ranges = {one.name: one.specifier for one in map(Requirement, needs)}
    for name, pin in pins().items():
        (version,) = (one.version for one in pin.specifier)
        lowest = next(one.version for one in ranges[name] if one.operator == ">=")
        assert version == f"{lowest}.0" and version in ranges[name]


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the oldest releases and what they ask for; all else, torch too, is that of this one."""
    folder = tmp_path_factory.mktemp("oldest")
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    python = folder / "bin" / "python"
    torch = folder / "torch.txt"  # as here, so that it is met already and not fetched
    torch.write_text("\n".join(n for n in (ROOT / "constraints.txt").read_text().splitlines() if n.startswith("torch==")) + "\n")
    pip = [python, "-m", "pip", "install", "-qq", "--no-compile", "--disable-pip-version-check", "-c", torch]
    done = subprocess.run([*pip, "-r", PINS], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{PINS.name} cannot be installed here: {(done.stderr.strip().splitlines() or ['pip said nothing'])[-1]}")
    for name, pin in pins().items():
        code = f"from importlib.metadata import version; print(version({name!r}))"
        said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        assert said in pin.specifier
    return python


@pytest.mark.slow
@pytest.mark.parametrize("file", FORMS)
def test_every_form_loads_under_the_oldest_releases(file: str, oldest: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [oldest, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", file]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
