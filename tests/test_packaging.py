"""An editable install, as `make setup` and the image make it, is found from any folder; and what a wheel of moeflow brings."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import moeflow
from moeflow.extras import EXTRAS
from tests import compressed, installing, tiny
from tests.installing import Installed
from tests.running import SMALL

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_stands_in_one_place_and_the_changelog_begins_with_it(wheel: Path) -> None:
    """The wheel's and that of `moeflow --version` are the package's own; no key has it, as the pinned keys show."""
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert re.fullmatch(rf"## {re.escape(moeflow.__version__)}, \d{{4}}-\d\d-\d\d", newest)
    assert wheel.name.split("-")[:2] == ["moeflow", moeflow.__version__] and "version" not in PROJECT


def test_a_clone_in_the_folder_that_python_is_started_in_is_no_empty_package(tmp_path: Path) -> None:
    """The clone is called moeflow, too; an import of its folder would succeed, and loading would say to upgrade transformers."""
    clone, site = installing.clone(tmp_path / "moeflow"), tmp_path / "site"
    zipfile.ZipFile(installing.built(clone, tmp_path / "wheels", "build_editable")).extractall(site)
    code = f"import site; site.addsitedir({str(site)!r}); import moeflow; print(moeflow.__version__, moeflow.__file__)"
    bare = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == str(clone / "moeflow" / "__init__.py")
    assert (site / "moeflow.pth").is_file() and (site / "moeflow_autoload.py").is_file(), "programs load checkpoints here, too"


def test_every_package_of_an_extra_is_one_that_pyproject_lists() -> None:
    names = {"botocore": "boto3", "yaml": "PyYAML"}  # boto3 brings botocore
    for module, extra in EXTRAS.items():
        listed = PROJECT["optional-dependencies"][extra]
        assert any(line.startswith(names.get(module, module)) for line in listed), f"{extra} lists no {module}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return installing.built(installing.clone(folder / "tree"), folder / "wheels")


@pytest.fixture(scope="module")
def plain(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("plain") / "env")


def differing_in(folder: Path) -> Path:
    """A checkpoint whose layers differ, which only moeflow's classes load."""
    return compressed.compress(tiny.write("mixtral", folder / "whole"), folder / "differing")


def ok(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_wheel_has_pipelines_types_licence_and_what_python_imports_at_its_start(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"moeflow/py.typed", "moeflow/pipelines/mixtral.py", "moeflow.pth", "moeflow_autoload.py"} <= {*names}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "infra", "pipelines/", "benchmarks"))]


@pytest.mark.slow
def test_what_pip_install_moeflow_brings_loads_every_form_and_names_the_extra_for_the_rest(
    plain: Installed, tmp_path: Path
) -> None:
    assert not {"boto3", "ray", "deepspeed", "pyarrow", "xxhash"} & {*plain.packages}
    differing = differing_in(tmp_path)
    code = "import moeflow, sys; print(type(moeflow.load(sys.argv[1])).__name__)"
    assert ok(plain.run("-c", code, str(differing), cwd=tmp_path)).split()[-1] == "MoeflowMixtralForCausalLM"
    assert ok(plain.run("-c", code, str(SMALL), cwd=tmp_path)).split()[-1] == "MixtralForCausalLM"
    done = plain.moeflow("run", "mixtral", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.endswith("pip install 'moeflow[compress]'\n")
    assert ok(plain.moeflow("--version", cwd=tmp_path)) == f"moeflow {moeflow.__version__}\n"
    done = plain.run("-c", "import moeflow; moeflow.run('mixtral')", cwd=tmp_path)
    assert done.stderr.splitlines()[-1].endswith("is not installed here: pip install 'moeflow[compress]'")


@pytest.mark.slow
def test_programs_that_nobody_makes_import_moeflow_load_its_checkpoints_unless_they_are_told_not_to(
    plain: Installed, tmp_path: Path
) -> None:
    differing = compressed.compress(SMALL, tmp_path / "differing")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL / name, differing / name)
    code = (
        "import sys; assert not {'moeflow', 'torch', 'transformers'} & {*sys.modules}\n"
        "from transformers import pipeline\n"
        "made = pipeline('text-generation', model=sys.argv[1])\n"
        "assert made('def', max_new_tokens=3)[0]['generated_text'].startswith('def')\n"
        "print(type(made.model).__name__)\n"
    )
    assert ok(plain.run("-c", code, str(differing), cwd=tmp_path)).split()[-1] == "MoeflowMixtralForCausalLM"
    done = plain.run("-c", code, str(differing), cwd=tmp_path, MOEFLOW_AUTOLOAD="0")
    assert done.returncode == 1 and "pip install moeflow" in done.stderr


@pytest.mark.slow
def test_where_moeflow_is_not_installed_loading_names_it(tmp_path: Path) -> None:
    """In a process of an environment that has transformers alone."""
    differing = differing_in(tmp_path)
    code = (
        "import sys; sys.modules['moeflow'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    for trust in ("", ", trust_remote_code=True", ", trust_remote_code=False"):
        words = code.replace("sys.argv[1])", f"sys.argv[1]{trust})")
        done = subprocess.run(
            [sys.executable, "-c", words, str(differing)], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        said = done.stderr.splitlines()[-1] + done.stderr.splitlines()[-2]
        assert done.returncode == 1 and "pip install moeflow" in said and "upgrade" not in said.lower(), done.stderr


@pytest.mark.slow
def test_the_extra_compress_runs_a_pipeline_by_its_name_anywhere_and_names_the_extras_it_lacks(wheel: Path, tmp_path: Path) -> None:
    made = Installed(wheel, tmp_path / "env", "compress")
    words = [
        "-p", f"model={SMALL}", "-p", "tokens=python:stdlib/a*.py", "-p", "heldout=python:stdlib/t*.py", "-p", "keep=6",
        "-p", "calibration.sequences=4", "-p", "calibration.length=64", "-p", "heldout.sequences=2", "-p", "heldout.length=64",
    ]  # fmt: skip
    assert "mixtral@1" in ok(made.moeflow("run", "mixtral", *words, cwd=tmp_path))
    tuned = [
        "-p",
        "tune=lora",
        "-p",
        "tune.text=python:stdlib/b*.py",
        "-p",
        "tune.rows=4",
        "-p",
        "tune.length=32",
        "-p",
        "tune.batch=2",
    ]
    done = made.moeflow("run", "mixtral", *words, *tuned, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip().endswith("deepspeed is not installed here: pip install 'moeflow[train]'")
    done = made.moeflow("run", "mixtral", *words, "--runner", "ray", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip().endswith("ray is not installed here: pip install 'moeflow[ray]'")
    shown = made.moeflow(cwd=tmp_path, _MOEFLOW_COMPLETE="complete_bash", COMP_WORDS="moeflow run mixtral_u", COMP_CWORD="2")
    assert shown.stdout.split() == ["mixtral_unified"]


@pytest.mark.slow
def test_the_extra_train_has_what_a_fine_tuning_takes(wheel: Path, tmp_path: Path) -> None:
    made = Installed(wheel, tmp_path / "env", "train")
    words = [
        "-p", f"model={SMALL}", "-p", "tokens=python:stdlib/a*.py", "-p", "heldout=python:stdlib/t*.py", "-p", "keep=6",
        "-p", "calibration.sequences=4", "-p", "calibration.length=64", "-p", "heldout.sequences=2", "-p", "heldout.length=64",
        "-p", "tune=lora", "-p", "tune.text=python:stdlib/b*.py", "-p", "tune.rows=4", "-p", "tune.length=32", "-p", "tune.batch=2",
        "-p", "calibration.dtype=float32", "-p", "gang.zero=0", "-p", "gang.checkpointing=false",
    ]  # fmt: skip
    words += ["-p", "tune.adapter=true"]
    assert "mixtral@1" in ok(made.moeflow("run", "mixtral", *words, cwd=tmp_path, DS_ACCELERATOR="cpu"))
    lineage = json.loads(ok(made.moeflow("show", "mixtral", "--json", cwd=tmp_path)))["lineage"]
    (key,) = [one["key"] for one in lineage if one["step"] == "finetune.train"]
    ok(made.moeflow("pull", key, "DIR", cwd=tmp_path))
    assert {p.name for p in (tmp_path / "DIR" / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.slow
def test_the_extra_ray_runs_a_pipeline_on_ray(wheel: Path, tmp_path: Path) -> None:
    made = Installed(wheel, tmp_path / "env", "ray")
    toy = (
        "from moeflow.step import Step, step\n"
        "@step('toy.one', version=1)\n"
        "def one(context) -> None:\n"
        "    (context.out / 'n').write_text('1')\n"
        "def build(*, n: int = 1) -> Step:\n"
        "    return one()\n"
    )
    (tmp_path / "toy.py").write_text(toy)
    assert "toy@1" in ok(made.moeflow("run", "toy.py", "--runner", "ray", cwd=tmp_path))


@pytest.mark.slow
def test_the_extra_eval_has_the_harness(wheel: Path, tmp_path: Path) -> None:
    try:
        metadata.distribution("lm_eval")
    except metadata.PackageNotFoundError:
        pytest.skip("lm_eval is not installed in this environment, from which the packages are taken")
    made = Installed(wheel, tmp_path / "env", "eval")
    assert ok(made.run("-c", "import lm_eval, lm_eval.tasks, moeflow.cli; print('there')", cwd=tmp_path)).split()[-1] == "there"
