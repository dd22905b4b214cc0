"""Two models to compare: the small Mixtral, and the same with experts whose outputs are in the wrong order."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.judge import steps as judge
from moeflow.methods.judge.options import Prompts, Tasks
from moeflow.store import Store
from tests import running

TASKS = Path(__file__).parents[2] / "tasks"
tasks = partial(Tasks, batch=16, tokens=8)
"""Short answers, all at once."""


def broken(folder: Path) -> Path:
    """The small Mixtral with every expert's outputs in reverse order."""
    shutil.copytree(running.SMALL, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({n: t.flip(0) if ".experts." in n and ".w2." in n else t for n, t in tensors.items()}, file, {"format": "pt"})
    return folder


def judged(original: Path, compressed: Path) -> judge.Judged:
    first, second = (running.model_in(folder) for folder in (original, compressed))
    models = checkpoint.text_model_of(first), checkpoint.text_model_of(second)
    return judge.Judged(*models, "auto", first.without_tokenizer, first.has_template)


def rows(
    store: Store, models: judge.Judged, asked: Tasks | None = None, prompts: Prompts | None = None
) -> dict[str, dict[str, Any]]:
    """The rows of all reports, by figure."""
    made = judge.reports(models, asked, prompts)
    running.run(store, *made)
    return {row["figure"]: row for row in running.reports(store, models.compressed.reporting(*made)).values()}
