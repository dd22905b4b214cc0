"""A model of every form that moeflow writes answers lm-evaluation-harness's own command as it answers our step.

The command is run where nobody imports moeflow: Python does at its start what an installed moeflow asks of it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from moeflow.arch import Family
from moeflow.methods.judge import steps as judge
from moeflow.methods.judge.options import Tasks
from moeflow.model.formats import Format, format_of
from moeflow.model.layout import Folder, read_config
from moeflow.model.packed import Scheme
from tests import running
from tests.compressed import factor
from tests.methods.judge.judging import TASKS, judged
from tests.serve.forms import FORMS_OF, packed, plain, rewritten

pytestmark = pytest.mark.slow
AUTOLOAD = Path(__file__).parents[3] / "infra" / "autoload"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
LIMIT, LAYERS = 16, range(4)
COMPARED = (
    ("closing", "closing", "acc"),
    ("order", "order", "acc"),
    ("order.acc_norm", "order", "acc_norm"),
    ("python", "python", "acc"),
)
"""Figures of ours, and the task and metric that the harness has them under."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small Mixtral in every form, and the packed one multiplied out."""
    at = tmp_path_factory.mktemp("forms")
    made = {name: form(running.SMALL, at / name) for name, form in FORMS_OF.items()}
    # one scheme everywhere, which is compressed-tensors' own form
    made["int4"] = packed(running.SMALL, at / "int4", dict.fromkeys(LAYERS, Scheme(4, 32)))
    factors = rank_16(running.SMALL, at / "rank 16")
    made["low_rank_int4"] = packed(factors, at / "low_rank_int4", dict.fromkeys(LAYERS, Scheme(4, 16)))
    made["packed_whole"] = plain(made["packed"], at / "packed_whole")
    for folder in made.values():
        for name in TOKENIZER:
            if (running.SMALL / name).exists():
                shutil.copy(running.SMALL / name, folder)
    return made


def rank_16(source: Path, out: Path) -> Path:
    """The checkpoint with every matrix of every expert cut to rank 16."""
    config = read_config(Folder(source))

    def change(family: Family, layer: int, format: Format, tensors: dict[str, Tensor]) -> Format:
        for expert in range(format.experts):
            for name in family.expert(layer, expert):
                cut = factor(tensors.pop(name), 16)
                tensors |= dict(zip(family.factors(name), (cut.out_MR, cut.in_RN), strict=True))
        here = {n: t.shape for n, t in tensors.items() if n.startswith(family.prefix(layer))}
        return format_of(here, config, layer)

    return rewritten(source, out, change)


def by_command(models: Mapping[str, Path], out: Path) -> dict[str, dict[str, Any]]:
    """The figures that the harness's own command prints of each model, one command after the other in one process."""
    asked = ["--tasks", "python", "--include_path", str(TASKS), "--limit", str(LIMIT), "--batch_size", "8", "--device", "cpu"]
    commands = [
        ["run", "--model", "hf", "--model_args", f"pretrained={folder},dtype=auto", *asked, "--output_path", str(out / name)]
        for name, folder in models.items()
    ]
    code = (
        "import json, site, sys; site.addsitedir(sys.argv[1])\n"
        "import lm_eval.tasks as tasks\n"
        "whole = tasks.TaskManager(include_path=sys.argv[3])  # it reads all its thousands of tasks, for half a minute: once\n"
        "tasks.TaskManager = lambda *_, **__: whole\n"
        "from lm_eval.__main__ import cli_evaluate\n"
        "for words in json.loads(sys.argv[2]): sys.argv[1:] = words; cli_evaluate()"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(AUTOLOAD), json.dumps(commands), str(TASKS)]
    done = subprocess.run(command, cwd=TASKS, check=False, capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {}
    for name in models:
        (file,) = (out / name).glob("**/results_*.json")
        results[name] = json.loads(file.read_text())["results"]
    return results


def test_every_form_answers_the_harness_own_command_as_it_answers_ours_to_the_last_digit(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    store = running.store_in(tmp_path)
    theirs = by_command({name: folder for name, folder in folders.items() if name != "packed_whole"}, tmp_path / "theirs")
    ours = {}
    for name, folder in folders.items():
        models = judged(running.SMALL, folder)
        steps = judge.reports(models, Tasks(str(TASKS / "python.yaml"), limit=LIMIT), None)
        running.run(store, *steps)
        rows = {row["figure"]: row for row in running.reports(store, models.compressed.reporting(*steps)).values()}
        ours[name] = {figure: rows[figure]["compressed"] for figure, *_ in COMPARED}
        if name in theirs:
            assert ours[name] == {figure: theirs[name][task][f"{metric},none"] for figure, task, metric in COMPARED}, name
    assert ours["packed"] == ours["packed_whole"], "4 and 8 bits answer as what they stand for"
    assert len({json.dumps(figures) for figures in ours.values()}) > 3, (
        "the forms are different models, and not one that was loaded"
    )
