"""What our step says of a task is what lm-evaluation-harness's own command says of it, item by item."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.judge import steps as judge
from moeflow.methods.judge.options import Tasks
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import naee
from moeflow.sources import Texts
from moeflow.step import Step, upstream
from moeflow.store import Store
from tests import running, servers
from tests.methods.judge.judging import TASKS, broken, judged, rows

pytestmark = pytest.mark.slow  # importing lm_eval takes five seconds
GROUP = str(TASKS / "python.yaml")
COMPARED = (
    ("closing", "closing", "acc"),
    ("order", "order", "acc"),
    ("order.acc_norm", "order", "acc_norm"),
    ("python", "python", "acc"),
)
"""Figures of ours, and the task and metric that the harness has them under."""


@pytest.fixture
def models(tmp_path: Path) -> tuple[Store, judge.Judged]:
    return running.store_in(tmp_path), judged(running.SMALL, broken(tmp_path / "broken"))


def by_command(model: Path, out: Path, *words: str) -> dict[str, Any]:
    """The figures that the harness's own command prints of a model in a folder."""
    model_words = ["--model", "hf", "--model_args", f"pretrained={model},dtype=auto", "--device", "cpu", "--batch_size", "8"]
    task_words = ["--tasks", "python", "--include_path", str(TASKS), "--output_path", str(out), *words]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lm_eval", "run", *model_words, *task_words]
    subprocess.run(command, cwd=TASKS, check=True, capture_output=True, env=os.environ | offline)
    (file,) = out.glob("**/results_*.json")
    results: dict[str, Any] = json.loads(file.read_text())["results"]
    return results


@pytest.mark.parametrize("shots", [None, 2])  # a command takes half a minute, most of it for the harness's list of its tasks
def test_our_figures_are_those_of_the_harness_own_command_to_the_last_digit(
    shots: int | None, models: tuple[Store, judge.Judged], tmp_path: Path
) -> None:
    store, both = models
    found = rows(store, both, Tasks(GROUP, shots=shots, limit=30))
    words = ["--limit", "30", *(["--num_fewshot", str(shots)] if shots else [])]
    for side, folder in (("original", running.SMALL), ("compressed", tmp_path / "broken")):
        theirs = by_command(folder, tmp_path / f"theirs-{side}", *words)
        for figure, task, metric in COMPARED:
            assert found[figure][side] == theirs[task][f"{metric},none"], (figure, side)


def test_items_are_paired_and_a_broken_model_loses(models: tuple[Store, judge.Judged]) -> None:
    store, both = models
    found = rows(store, both, Tasks(f"{TASKS / 'closing.yaml'},{TASKS / 'order.yaml'}"))
    assert {*found} == {"closing", "order", "order.acc_norm"}
    for figure, items in (("closing", 80), ("order", 60)):
        row = found[figure]
        assert row["items"] == items and row["chance"] == 0.25 and row["original"] > 0.6 > row["compressed"]
        assert row["change_interval"][1] < 0 < row["interval"][0] <= row["compressed"] <= row["interval"][1]
        assert round((row["compressed"] - row["original"]) * items) == row["wins"] - row["losses"]


def test_each_task_is_a_step_of_each_model_and_a_metric_may_be_chosen(models: tuple[Store, judge.Judged]) -> None:
    store, both = models
    steps = judge.reports(both, Tasks(GROUP, metrics="acc_norm", limit=8), None)
    asked = [(s.params["task"], s.inputs[0].key) for s in upstream(steps) if s.name == "judge.of_harness"]
    assert len(asked) == len({*asked}) == 4 and {task for task, _ in asked} == {"closing", "order"}
    found = rows(store, both, Tasks(GROUP, metrics="acc_norm", limit=8))
    assert found["order"]["name"] == "acc norm (order)" and "order.acc_norm" not in found
    assert found["closing"]["name"] == "acc (closing)", "a task without the metric keeps its own"
    words = {word for s in steps for word in s.spec.figures}
    assert {*found} <= words


def test_figures_that_are_no_means_and_answers_in_words_have_intervals_too(
    models: tuple[Store, judge.Judged], tmp_path: Path
) -> None:
    store, both = models
    shutil.copy(TASKS / "prompts.jsonl", tmp_path / "prompts.jsonl")
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "prompts.jsonl"}}, "test_split": "test"}
    rolling = {"task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{prompt}}"}
    written = {
        "task": "written", "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "!function words.first",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    (tmp_path / "words.py").write_text("def first(doc):\n    return doc['prompt'].split()[0]\n")
    for task in (rolling, written):
        text = yaml.safe_dump(files | task).replace("'!function words.first'", "!function words.first")
        (tmp_path / f"{task['task']}.yaml").write_text(text)
    found = rows(store, both, Tasks(f"{tmp_path / 'rolling.yaml'},{tmp_path / 'written.yaml'}"))
    row = found["rolling"]
    assert row["better"] == "lower" and row["compressed"] > row["original"] and row["change_interval"][0] > 0
    assert row["interval"][0] <= row["compressed"] <= row["interval"][1]
    assert found["written"]["items"] == 16 and "chance" not in found["written"]


def test_a_changed_data_file_asks_again_and_an_unchanged_one_does_not(models: tuple[Store, judge.Judged], tmp_path: Path) -> None:
    _, both = models
    for name in ("closing.yaml", "closing.jsonl"):
        shutil.copy(TASKS / name, tmp_path / name)

    def keys() -> set[str]:
        return {s.key for s in judge.reports(both, Tasks(str(tmp_path / "closing.yaml")), None)}

    before = keys()
    assert keys() == before
    lines = (tmp_path / "closing.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "closing.jsonl").write_text("".join(lines[:-1]))
    assert keys().isdisjoint(before)


def test_what_the_harness_cannot_ask_is_refused_in_one_line(models: tuple[Store, judge.Judged], tmp_path: Path) -> None:
    _, both = models

    def refused(wanted: str, names: str, **more: Any) -> None:
        with pytest.raises(ValueError, match=wanted) as told:
            judge.reports(both, Tasks(names, **more), None)
        assert "\n" not in str(told.value)

    def task(name: str, **config: Any) -> str:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "dataset_path": "json", **config}))
        return str(tmp_path / f"{name}.yaml")

    refused("the task closign does not exist; did you mean 'closing'", "closign", folder=str(TASKS))
    refused("the task helaswag does not exist; did you mean 'hellaswag'", "helaswag")
    refused("tasks.metrics=accc: no task has this metric; did you mean 'acc'", GROUP, metrics="accc")
    assert len(judge.reports(both, Tasks(f"{GROUP},{TASKS / 'closing.yaml'}"), None)) == 3, "a task of a group is asked once"
    refused("runs what the model writes, without a sandbox; say tasks.unsafe=true", task("unsafe", unsafe_code=True))
    refused("is about pictures or sound", task("seen", doc_to_image="image"))
    refused(
        "the task lost reads nowhere.jsonl, which lies neither in", task("lost", dataset_kwargs={"data_files": "nowhere.jsonl"})
    )
    (tmp_path / "group.yaml").write_text("group: all\ntask:\n  - nothing\n")
    refused(r"the task nothing does not exist \(in the group all\)", str(tmp_path / "group.yaml"))
    (tmp_path / "empty.yaml").write_text("- a\n")
    refused("empty.yaml is no task of lm-evaluation-harness", str(tmp_path / "empty.yaml"))


def test_a_data_set_on_the_hub_is_pinned_to_its_commit(
    models: tuple[Store, judge.Judged], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, both = models
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with servers.hub_server() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        commits = {
            "with-page": hub.put("datasets/org/with-page", {"README.md": b"About", "a.zip": b"x"}),
            "bare": hub.put("datasets/org/bare", {"data/test.jsonl": b"{}"}),
        }
        for name, commit in commits.items():
            (tmp_path / f"{name}.yaml").write_text(
                yaml.safe_dump({"task": name, "dataset_path": f"org/{name}", "test_split": "test"})
            )
            (report,) = judge.reports(both, Tasks(str(tmp_path / f"{name}.yaml")), None)
            asked = [s for s in upstream([report]) if s.name == "judge.of_harness"]
            assert [s.params["changes"]["dataset_kwargs"] for s in asked] == [{"revision": commit}] * 2
        (tmp_path / "gone.yaml").write_text(yaml.safe_dump({"task": "gone", "dataset_path": "org/gone"}))
        with pytest.raises(ValueError, match="the data set of the task gone cannot be had: .*org/gone") as told:
            judge.reports(both, Tasks(str(tmp_path / "gone.yaml")), None)
        assert "\n" not in str(told.value)


def test_a_model_whose_layers_differ_is_asked_like_any_other(models: tuple[Store, judge.Judged]) -> None:
    store, both = models
    model = running.model_in(running.SMALL)
    matrix = data.tokens(Texts("python:stdlib/a*.py"), model, Sample(8, 64))
    seen = calibrate.run(model, matrix, Pass(batch=8, shard=8))
    pruned = naee.prune(seen, 6, Search("layerwise"))
    mixed = pruned.with_layers({0: model.layers[0]})  # eight experts there and six in the others: moeflow's own format
    compressed: Step = checkpoint.text_model_of(mixed)
    found = rows(store, judge.Judged(both.original, compressed, "auto"), Tasks(GROUP, limit=30))
    assert found["python"]["compressed"] > 0.5 > found["python"]["chance"] == 0.25
