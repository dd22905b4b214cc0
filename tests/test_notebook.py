"""What docs/first-hour.md says to write in a notebook, in a notebook: Jupyter's own kernel runs its cells, one after another."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

CLIENT = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in sys.argv[2:]])
NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[1])
"""


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a process that has a notebook's client and kernel, installed beside everything else."""
    folder = tmp_path_factory.mktemp("jupyter")
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-compile", "--disable-pip-version-check"]
    words = [*pip, "-c", ROOT / "constraints.txt", "--target", folder, "nbclient", "ipykernel"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a notebook cannot be installed here: {(done.stderr.strip().splitlines() or ['pip said nothing'])[-1]}")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # a kernel is the `python` found there
    found = {"PATH": path, "JUPYTER_PATH": str(folder / "share" / "jupyter")}
    return os.environ | found | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]), "OMP_NUM_THREADS": "1"}


def outputs(cells: list[str], folder: Path, environment: dict[str, str]) -> list[list[dict[str, Any]]]:
    """What each cell shows."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(folder / "made.ipynb"), *cells],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [cell["outputs"] for cell in json.loads((folder / "made.ipynb").read_text())["cells"]]


def text(shown: list[dict[str, Any]], kind: str) -> str:
    """The text of a cell's streams ("stdout", "stderr"), or of what it displays ("text/html")."""
    parts = [one["text"] if one.get("name") == kind else one.get("data", {}).get(kind, "") for one in shown]
    return "".join("".join(part) for part in parts)


def test_a_notebook_compresses_shows_and_loads(jupyter: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    page = (ROOT / "docs" / "first-hour.md").read_text()
    (cited,) = re.findall(r"^## The same in a notebook\n\n((?:    .*\n|\n)+)", page, re.MULTILINE)
    run, sep, load = textwrap.dedent(cited).partition("model, tokenizer")
    shown = outputs([run, "small", "small.report", sep + load], tmp_path, jupyter)
    assert not [one for cell in shown for one in cell if one["output_type"] == "error"]
    assert re.search(r"\[(\d+)/\1\] \w+\.\w+ +done", text(shown[0], "stdout")), "a run shows how far it is"
    assert "Warning" not in text(shown[0], "stderr") + text(shown[3], "stderr")
    assert "<b>mixtral@1</b>" in text(shown[1], "text/html") and "KL" in text(shown[2], "text/html")
    assert [len(cell) for cell in shown[1:3]] == [1, 1] and "\x1b" not in json.dumps(shown[1:3]), "a table stands alone"
    assert text(shown[3], "stdout").count("def __init__(self") == 1
