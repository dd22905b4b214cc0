"""Ask one model the rows of a file, and judge what it writes."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from moeflow.methods.judge import sandbox, scoring
from moeflow.methods.judge.answers import Answers, Asked, Metric
from moeflow.methods.judge.generating import Drawing, Writer, Written
from moeflow.methods.judge.options import Prompts, Tasks
from moeflow.methods.judge.task_files import METRICS, Item, Kind, strict

Progress = Callable[[int, int, str], None]


def answered(model: Path, name: str, kind: Kind, items: Sequence[Item], how: Tasks, dtype: str, progress: Progress) -> Answers:
    """What a model answers to the items of a file, each judged by its kind; every value is 0 or 1."""
    writer = Writer(model, dtype)
    prompts = [writer.prompt(i.asked, i.tools, i.begin, chat=how.chat) for i in items]
    written = writer.written(prompts, [i.stop for i in items], how.tokens, how.batch, progress)
    notes = []
    values: list[dict[str, float]] = []
    if kind == "code":
        runs = [
            sandbox.ran(scoring.program(item.begin + w.text, item), how.seconds) for item, w in zip(items, written, strict=True)
        ]
        values = [{"passed": float(run.passed)} for run in runs]
        if not all(run.alone for run in runs):
            notes.append("the kernel lets this user make no namespace, so what the models wrote ran with the network")
    for item, w in zip(items, written, strict=True):
        whole = item.begin + w.text
        if kind == "answers":
            values.append(
                {
                    "exact_match": float(scoring.same_number(whole, item.answer)),
                    "exact_match,strict": float(scoring.same_number(whole, item.answer, strict=True)),
                }
            )
        elif kind == "calls":
            values.append({"valid_call": float(scoring.right_call(whole, item.tools))})
    keys = METRICS[kind][: 1 if kind == "answers" and not strict(items) else None]
    metrics = {key: _mean(key, [v[key] for v in values]) for key in keys}
    kept = [Asked(_digest(p), {k: v[k] for k in keys}, text=w.text) for p, v, w in zip(prompts, values, written, strict=True)]
    return Answers(name, metrics, kept, notes)


def continued(model: Path, name: str, items: Sequence[Item], how: Prompts, dtype: str, progress: Progress) -> Answers:
    """What a model writes behind the prompts of a file, by its likeliest tokens and by drawn ones: tokens, length, repetition."""
    writer = Writer(model, dtype)
    prompts = [writer.prompt(i.asked, i.tools, i.begin, chat=False) for i in items]
    stops = [i.stop for i in items]
    greedy = writer.written(prompts, stops, how.tokens, how.batch, progress)
    drawn = writer.written(prompts, stops, how.tokens, how.batch, progress, Drawing(how.temperature, how.seed))
    values = [{"length": float(len(w.tokens)), "repetition": scoring.repeated(w.tokens, how.ngram)} for w in greedy]
    metrics = {
        "length": Metric("length", "", float(np.mean([v["length"] for v in values])), higher=None, unit="tokens"),
        "repetition": Metric("repetition", "", float(np.mean([v["repetition"] for v in values])), higher=False),
    }
    kept = [_continued(p, v, g, d) for p, v, g, d in zip(prompts, values, greedy, drawn, strict=True)]
    return Answers(name, metrics, kept)


def _continued(prompt: list[int], values: dict[str, float], greedy: Written, drawn: Written) -> Asked:
    return Asked(_digest(prompt), values, text=greedy.text, tokens=greedy.tokens, sampled=drawn.tokens)


def _mean(key: str, values: Sequence[float]) -> Metric:
    name, _, filter = key.partition(",")
    return Metric(name, filter, float(np.mean(values)))


def _digest(prompt: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, prompt)).encode()).hexdigest()[:16]
