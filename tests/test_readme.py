"""The commands that README.md and the pages of docs/ give to somebody who has no model at hand, and the figures beside them."""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def cited(pattern: str, page: str) -> list[str]:
    """The words of the one command on a page that this pattern finds behind `moeflow`."""
    (command,) = re.findall(rf"^ +moeflow ({pattern}.*?)\n\n", PAGES[page], re.DOTALL | re.MULTILINE)
    return shlex.split(command.replace("\\\n", " "))


MOEFLOW = ("-c", "from moeflow.cli import main; main()")


def figures(words: list[str], store: Path, name: str = "") -> dict[str, Any]:
    """The figures of the result that a command's reports show, by their names; `name`: of the result, if not the pipeline's."""
    done = subprocess.run(
        [sys.executable, *MOEFLOW, *words, "--store", str(store)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = [sys.executable, *MOEFLOW, "show", name or words[1], "--json"]
    shown = subprocess.run([*words, "--store", str(store)], cwd=ROOT, capture_output=True, text=True, check=True)
    return {row["name"]: row["compressed"] for report in json.loads(shown.stdout)["reports"] for row in report["rows"]}


def said(pattern: str, page: str) -> list[float]:
    """The numbers in a sentence of a page."""
    ((*numbers,),) = re.findall(pattern, re.sub(r"\s+", " ", PAGES[page]))
    return [float(n) for n in numbers]


def test_the_plan_simulates_what_it_says() -> None:
    words = cited("plan pipelines/mixtral.py -p model=models/", "how-it-works.md")
    done = subprocess.run(
        [sys.executable, *MOEFLOW, *words, "--json", "--store", "none"], cwd=ROOT, capture_output=True, check=True
    )  # fmt: skip
    ((takes,),) = [re.findall(r"which takes (\d+) s, as simulated", PAGES["how-it-works.md"])]
    assert json.loads(done.stdout)["simulated"]["seconds"] == pytest.approx(float(takes), rel=0.2)


def test_the_shipped_model_is_pruned_by_the_first_command_to_what_it_says(tmp_path: Path) -> None:
    """The text is the running Python's own, so that another Python's figures are others, but near."""
    made = figures(cited("run mixtral -p model=models/", "first-hour.md"), tmp_path / "store")
    pattern = r"It leaves (\d) of 8 experts in ([\d.]+) MiB of 2.6, at a KL of ([\d.]+) nats"
    experts, size, divergence = said(pattern, "first-hour.md")
    assert made["experts per layer"] == experts
    assert made["bytes"] / 2**20 == pytest.approx(size, abs=0.05)
    assert made["KL to the original (stdlib)"] == pytest.approx(divergence, rel=0.2)


@pytest.mark.slow
def test_the_first_hour_is_spent_as_it_says(tmp_path: Path) -> None:
    """Its commands one after another in a folder of their own, and what it says to write in a notebook behind them."""
    for name in ("models", "pipelines"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def python(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    python(*MOEFLOW, *cited("run mixtral -p model=models/", "first-hour.md"))
    assert "mixtral@1" in python(*MOEFLOW, "ls")
    python(*MOEFLOW, "show", "mixtral")
    python(*MOEFLOW, "pull", "mixtral", "DIR")
    assert (tmp_path / "DIR" / "config.json").is_file()
    python(*MOEFLOW, "report", "mixtral", "-o", "report.html")
    assert "<html" in (tmp_path / "report.html").read_text()
    again = python(*MOEFLOW, "run", "DIR/recipe.yaml", "-p", "keep=5")
    assert "mixtral@2" in again and "calibrate.observe" not in again
    assert "mixtral@2" in python(*MOEFLOW, "compare", "mixtral@1", "mixtral@2")
    (code,) = re.findall(r"^    import moeflow\n\n.*?(?=\n\n\S)", PAGES["first-hour.md"], re.DOTALL | re.MULTILINE)
    told = python("-c", textwrap.dedent(code))
    assert "0 run" in told and "def __init__(self" in told


@pytest.mark.slow
def test_readme_is_followed_from_its_fit_to_the_notebook(tmp_path: Path) -> None:
    """Its commands one after another in a folder of their own, with a space in its name; and the fit is as it says."""
    here = tmp_path / "a folder"
    here.mkdir()
    (here / "models").symlink_to(ROOT / "models")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def python(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=here, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert cited("fit models/", "README.md") == cited("fit models/", "first-hour.md")
    python(*MOEFLOW, *cited("fit models/", "README.md"))
    shown = json.loads(python(*MOEFLOW, "show", "fit", "--json"))
    made = {row["name"]: row["compressed"] for report in shown["reports"] for row in report["rows"]}
    for page in ("README.md", "first-hour.md"):
        size, divergence = said(r"It fits 2.6 MiB into 693 KiB by taking (\d+), at a KL of ([\d.]+)[,.] ", page)
        assert made["bytes"] / 2**10 == pytest.approx(size, rel=0.01)
        assert made["KL to the original (stdlib)"] == pytest.approx(divergence, rel=0.2)
    (next_ones,) = re.findall(r"^    (moeflow report fit.*?)\n\n", PAGES["README.md"], re.DOTALL | re.MULTILINE)
    report, pull, run, compare = (shlex.split(line)[1:] for line in next_ones.splitlines())
    assert "fit@1" in python(*MOEFLOW, *report) and "<html" in (here / "report.html").read_text()
    python(*MOEFLOW, *pull)
    assert "fit@2" in python(*MOEFLOW, *run)
    assert "fit@2 against fit@1" in " ".join(python(*MOEFLOW, *compare).split())
    (load,) = re.findall(r"^    (model = moeflow.load.*)$", PAGES["README.md"], re.MULTILINE)
    assert "fit@2" in python("-c", f"import moeflow\n{load}\nprint(model.name_or_path)")


@pytest.mark.slow
def test_the_recipe_of_ours_is_as_much_closer_to_the_original_as_it_says(tmp_path: Path) -> None:
    words = cited("run mixtral_unified -p model=models/", "recipes.md")
    ours = figures(words, tmp_path / "store")
    alone = figures(
        [*words[: words.index("order=decompose,slim") - 1], "-p", "order=slim", "-p", "slim.bits=3"], tmp_path / "store"
    )
    for made, pattern in ((ours, r"a KL of ([\d.]+) in (\d+) KiB, with"), (alone, r"and of ([\d.]+) in (\d+) KiB with GPTQ alone")):
        divergence, size = said(pattern, "recipes.md")
        assert made["KL to the original (stdlib)"] == pytest.approx(divergence, rel=0.2)
        assert made["bytes"] / 2**10 == pytest.approx(size, rel=0.01)
    assert ours["bytes"] < alone["bytes"] and ours["KL to the original (stdlib)"] < alone["KL to the original (stdlib)"]
