"""Let lm-evaluation-harness ask one model one task, as its own command does, and keep what every item scored."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moeflow.methods.judge.answers import Answers, Asked, Metric
from moeflow.model.quiet import quiet

CHOICES = "multiple_choice"
GUESSED = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
"""The metrics of a choice among answers whose score by guessing is one among them."""


def asked(
    model: Path, task: str, file: Path, changes: Mapping[str, Any], folder: Path,
    *, dtype: str, batch: int, shots: int | None, limit: int | None, how: Mapping[str, bool],
) -> Answers:  # fmt: skip
    """What the model in a folder answers to the task in `file`, which `changes` go over; `folder`: an empty one, to work in.

    `how`: whether the chat template is used ("chat") and whether the task may run what the model writes ("unsafe"). All else is the
    harness's default, its seeds too, so that the figures are those of `lm_eval --model hf`. Raises ValueError for a task that
    the harness cannot read.
    """
    import torch
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    written = folder / "task.yaml"
    written.write_text(yaml.safe_dump({"include": str(file), "task": task, **changes}))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet():
        manager = TaskManager(include_defaults=False)
        (one,) = manager.load([str(written)])["tasks"].values()
        lm = HFLM(pretrained=str(model), dtype=dtype, device=device, batch_size=batch, trust_remote_code=False)
        done: Any = simple_evaluate(
            lm, tasks=[one], num_fewshot=shots, limit=limit, bootstrap_iters=0, task_manager=manager,
            apply_chat_template=how["chat"], confirm_run_unsafe_code=how["unsafe"],
        )  # fmt: skip
    return _answers(task, one, done)


def _answers(task: str, one: Any, done: Mapping[str, Any]) -> Answers:
    (name,) = done["samples"]
    figures, higher = done["results"][name], done["higher_is_better"][name]
    metrics: dict[str, Metric] = {}
    items: dict[int, Asked] = {}
    for sample in done["samples"][name]:
        at = items.get(sample["doc_id"])
        if at is None:
            at = items[sample["doc_id"]] = Asked(f"{sample['doc_hash']}/{sample['prompt_hash']}", {}, _chance(one, sample["doc"]))
        for metric in sample["metrics"]:
            at.values[f"{metric},{sample['filter']}"] = _plain(sample[metric])
    for key in dict.fromkeys(key for item in items.values() for key in item.values):
        metric, _, filter = key.partition(",")
        aggregate = getattr(one.aggregation().get(metric), "__name__", "mean")
        guessed = one.OUTPUT_TYPE == CHOICES and metric in GUESSED
        metrics[key] = Metric(
            metric, "" if filter == "none" else filter, float(figures[key]), aggregate, higher.get(metric), guessed
        )
    return Answers(task, metrics, list(items.values()))


def _chance(task: Any, doc: Any) -> float | None:
    """The score of guessing one item; None where there is nothing to choose from."""
    if task.OUTPUT_TYPE != CHOICES or (not task.config.doc_to_choice and not hasattr(task, "doc_to_choice")):
        return None
    choices = task.doc_to_choice(doc)
    return 1 / len(choices) if choices else None


def _plain(value: Any) -> Any:
    """A value as JSON holds it: a number, a text, or a list of these."""
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, str) or value is None:
        return value
    return value.tolist() if hasattr(value, "tolist") else float(value) if isinstance(value, bool | int | float) else str(value)
