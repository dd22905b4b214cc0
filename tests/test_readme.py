"""The commands that README.md gives to somebody who has no model at hand, and the figures beside them."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def command(pipeline: str) -> list[str]:
    """The words of the command that runs the pipeline on the shipped model."""
    (cited,) = re.findall(rf"^ +moeflow run ({re.escape(pipeline)} -p model=models/.*?)\n\n", README, re.DOTALL | re.MULTILINE)
    return shlex.split(cited.replace("\\\n", " "))


def figures(words: list[str], store: Path, name: str = "") -> dict[str, Any]:
    """The figures of the result that a command's reports show, by their names; `name`: of the result, if not the pipeline's."""
    done = subprocess.run(
        [sys.executable, *words, "--store", str(store)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = [sys.executable, "-c", "from moeflow.cli import main; main()", "show", name or Path(words[0]).stem, "--json"]
    shown = subprocess.run([*words, "--store", str(store)], cwd=ROOT, capture_output=True, text=True, check=True)
    return {row["name"]: row["compressed"] for report in json.loads(shown.stdout)["reports"] for row in report["rows"]}


def said(pattern: str) -> list[float]:
    """The numbers in a sentence of README.md."""
    ((*numbers,),) = re.findall(pattern, re.sub(r"\s+", " ", README))
    return [float(n) for n in numbers]


def test_the_plan_in_the_readme_simulates_what_it_says() -> None:
    (cited,) = re.findall(r"^ +moeflow (plan pipelines/mixtral.py -p model=models/.*?)\n\n", README, re.DOTALL | re.MULTILINE)
    words = [*shlex.split(cited.replace("\\\n", " ")), "--json", "--store", "none"]

    done = subprocess.run(
        [sys.executable, "-c", "from moeflow.cli import main; main()", *words], cwd=ROOT, capture_output=True, check=True
    )
    (takes,) = re.findall(r"which takes (\d+) s, as simulated", README)
    assert json.loads(done.stdout)["simulated"]["seconds"] == pytest.approx(float(takes), rel=0.2)


def test_the_shipped_model_is_pruned_by_the_command_in_the_readme_to_what_it_says(tmp_path: Path) -> None:
    """The text is the running Python's own, so that another Python's figures are others, but near."""
    made = figures(command("pipelines/mixtral.py"), tmp_path / "store")
    experts, size, divergence = said(r"It leaves (\d) of 8 experts in ([\d.]+) MiB of 2.6, at a KL of ([\d.]+) nats")
    assert made["experts per layer"] == experts
    assert made["bytes"] / 2**20 == pytest.approx(size, abs=0.05)
    assert made["KL to the original (stdlib)"] == pytest.approx(divergence, rel=0.2)


@pytest.mark.slow
def test_the_model_fits_into_the_budget_in_the_readme_at_what_it_says(tmp_path: Path) -> None:
    (cited,) = re.findall(r"^ +moeflow (fit models/.*?)\n\n", README, re.DOTALL | re.MULTILINE)
    words = shlex.split(cited.replace("\\\n", " "))
    made = figures(["-c", "from moeflow.cli import main; main()", *words], tmp_path / "store", "fit")
    size, divergence = said(r"It fits into 2 MiB by taking ([\d.]+), at a KL of ([\d.]+), and")
    assert made["bytes"] / 2**20 == pytest.approx(size, abs=0.1)
    assert made["KL to the original (stdlib)"] == pytest.approx(divergence, rel=0.5)


@pytest.mark.slow
def test_the_recipe_of_ours_in_the_readme_is_as_much_closer_to_the_original_as_it_says(tmp_path: Path) -> None:
    words = command("pipelines/mixtral_unified.py")
    ours = figures(words, tmp_path / "store")
    alone = figures(
        [*words[: words.index("order=decompose,slim") - 1], "-p", "order=slim", "-p", "slim.bits=3"], tmp_path / "store"
    )
    for made, pattern in ((ours, r"a KL of ([\d.]+) in (\d+) KiB, with"), (alone, r"and of ([\d.]+) in (\d+) KiB with GPTQ alone")):
        divergence, size = said(pattern)
        assert made["KL to the original (stdlib)"] == pytest.approx(divergence, rel=0.2)
        assert made["bytes"] / 2**10 == pytest.approx(size, rel=0.01)
    assert ours["bytes"] < alone["bytes"] and ours["KL to the original (stdlib)"] < alone["KL to the original (stdlib)"]
