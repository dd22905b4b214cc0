"""The newest transformers beside the pinned one: the same keys, and the same bytes of every step."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from moeflow.arch import ARCH
from moeflow.store import Store
from moeflow.store.names import key_of
from tests import layouts, predicting, running

ROOT = Path(__file__).parents[1]
PIN = ROOT / "constraints-newest.txt"
MEASURED = "evaluate.speed-"
"""How the key begins of what is a fact about the machine at that moment, and never the same twice."""
TINY = ("calibration.sequences=8", "calibration.length=16", "calibration.batch=2", "heldout.sequences=2", "heldout.length=16")
COMPRESSIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "shipped": ("tiny", ("tokens=python:stdlib/a*.py", "heldout=python:stdlib/t*.py", "calibration.sequences=8")),
    "glm4_moe": ("mixtral", ("search=reap", "mtp=prune", *TINY)),
    "qwen3_5_moe": ("mixtral", ("search=swap", *TINY)),
    "gpt_oss": ("mixtral_unified", ("slim=gptq", "slim.group=8", "trim=experts", "trim.dropped=2", *TINY)),
}
"""By model: a pipeline and its parameters."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a process that imports the newest transformers. Everything else is as it is here."""
    folder = tmp_path_factory.mktemp("newest")
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-compile", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "--target", folder, "-r", PIN], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{PIN.name} cannot be installed here: {(done.stderr.strip().splitlines() or ['pip said nothing'])[-1]}")
    made = variables(str(folder))
    assert f"transformers=={python(['-c', VERSION], made)}" in PIN.read_text().splitlines()
    return made


VERSION = "from importlib.metadata import version; print(version('transformers'), end='')"


def variables(*folders: str) -> dict[str, str]:
    path = os.pathsep.join([*folders, str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def python(words: Sequence[str], environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]  # pytest says what failed on stdout
    return done.stdout


def model(name: str, folder: Path) -> Path:
    if name == "shipped":
        return running.SMALL
    if name in layouts.KINDS:
        return layouts.write(name, folder)
    predicting.write(name, folder, num_hidden_layers=3, first_k_dense_replace=1)
    layouts.configure(folder, lambda config: {k: v for k, v in config.items() if k != ARCH})
    return folder


def results(name: str, source: Path, folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """The digest of what every step left, by its key, of the compression of this name."""
    pipeline, words = COMPRESSIONS[name]
    given = [f"model={source}", *words]
    if not any(word.startswith("tokens=") for word in words):
        given += [f"tokens={folder.parent / 'tokens-8-16-0.npy'}", f"heldout={folder.parent / 'tokens-8-16-1.npy'}"]
    command = ["run", f"pipelines/{pipeline}.py", "--store", str(folder), "--runner", "process", "--json"]
    words_ = [*command, *(w for word in given for w in ("-p", word))]
    python(["-c", "from moeflow.cli import main; main()", *words_], environment | {"MOEFLOW_CACHE": str(folder / "cache")})
    store = Store.open(str(folder))
    keys = [key_of(entry.name) for entry in store.blobs.list("manifests/")]
    return {key: store.manifest(key).digest for key in keys if not key.startswith(MEASURED)}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_the_newest_transformers_gives_the_same_keys_and_bytes(name: str, newest: dict[str, str], tmp_path: Path) -> None:
    for seed in (0, 1):
        running.matrix_of(tmp_path, seed=seed)
    source = model(name, tmp_path / "model")
    here, there = (
        results(name, source, tmp_path / where, environment) for where, environment in (("a", variables()), ("b", newest))
    )
    assert len(here) > 10 and here == there


def said_of_tests(environment: dict[str, str], *words: str) -> str:
    """What pytest says of tests that pass with these variables."""
    return python(["-m", "pytest", "-rs", "--slow", "-n", "0", "-p", "no:cacheprovider", *words], environment)


def test_the_newest_transformers_works_on_what_its_list_says(newest: dict[str, str]) -> None:
    said = said_of_tests(newest, "tests/model/test_structure.py", "-k", "every_model_type")
    assert "SKIPPED" not in said, "write the list of this release: python -m tests.model.families"


def test_the_newest_transformers_loads_and_saves_what_is_moeflows_own_or_packed(newest: dict[str, str]) -> None:
    said_of_tests(
        newest, "tests/model/test_compressed.py", "tests/methods/slim/test_factors.py", "tests/methods/slim/test_loading.py"
    )
