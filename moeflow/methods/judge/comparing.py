"""The rows of a report on one task: both models' figures, item by item. No torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeflow.methods.judge import intervals
from moeflow.methods.judge.answers import Answers, Metric
from moeflow.methods.judge.scoring import agreed
from moeflow.methods.judge.task_files import figure_of
from moeflow.methods.reports import row


def rows(first: Answers, second: Answers, metrics: Sequence[str], *, only: bool = False) -> list[dict[str, Any]]:
    """A row for every metric, those of `metrics` first and in their order; with `only` these alone, if the task has one of them.

    The first is the task's own figure. Raises ValueError if the two models were not asked the same.
    """
    check_same(first, second)
    listed = [k for name in metrics for k, m in first.metrics.items() if m.name == name]
    keys = listed if only and listed else list(dict.fromkeys([*listed, *first.metrics]))
    return [_row(first, second, key, main=key == keys[0]) for key in keys]


def check_same(first: Answers, second: Answers) -> None:
    """Raise ValueError if two models were not asked the same."""
    if [i.digest for i in first.items] != [i.digest for i in second.items]:
        raise ValueError(f"the models were asked different items of {first.task}, so they cannot be paired; evaluate both again")


def _row(first: Answers, second: Answers, key: str, *, main: bool) -> dict[str, Any]:
    metric, other = first.metrics[key], second.metrics[key]
    pairs = [
        (a.values[key], b.values[key])
        for a, b in zip(first.items, second.items, strict=True)
        if key in a.values and key in b.values
    ]
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    made = row(name_of(first.task, metric), metric.value, other.value, metric.unit)
    made |= {"figure": figure_of(first.task, metric.name, metric.filter, main=main), "items": len(pairs)}
    if metric.higher is not None:
        made["better"] = "higher" if metric.higher else "lower"
    if all(isinstance(v, int | float) for v in (*before, *after)):
        if metric.higher is not None:
            sign = 1 if metric.higher else -1
            made["wins"] = sum(sign * (b - a) > 0 for a, b in pairs)
            made["losses"] = sum(sign * (b - a) < 0 for a, b in pairs)
        if metric.aggregate == "mean":
            made |= _with(intervals.of_mean(after), intervals.of_change(before, after))
    if metric.aggregate != "mean" and len(pairs) > 1 and (aggregate := _aggregate(metric.aggregate)) is not None:
        made |= _with(*intervals.resampled(before, after, aggregate))
    chances = [item.chance for item in first.items if key in item.values]
    if metric.guessed and chances and all(c is not None for c in chances):
        made["chance"] = float(np.mean([c for c in chances if c is not None]))
    return made


def name_of(task: str, metric: Metric) -> str:
    words = metric.name.replace("_", " ")
    return f"{words}, {metric.filter} ({task})" if metric.filter else f"{words} ({task})"


def _with(interval: intervals.Interval | None, change: intervals.Interval | None) -> dict[str, Any]:
    named = {"interval": interval, "change_interval": change}
    return {name: [*value] for name, value in named.items() if value is not None}


def _aggregate(name: str) -> intervals.Aggregate | None:
    """The harness's way to make a figure of items by its name; None for a task's own."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    by_name = {getattr(function, "__name__", key): function for key, function in AGGREGATION_REGISTRY.items()}
    return by_name.get(name)


def of_group(
    name: str, first: Sequence[Answers], second: Sequence[Answers], aggregates: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows of a group, whose figures are the means of its tasks', by their items or each alike, as the harness has it."""
    made: list[dict[str, Any]] = []
    for aggregate in sorted(aggregates, key=lambda a: metrics.index(a["metric"]) if a["metric"] in metrics else len(metrics)):
        filters = aggregate.get("filter_list")
        listed = [filters] if isinstance(filters, str) else filters
        keys = [
            k
            for k, m in first[0].metrics.items()
            if m.name == aggregate["metric"] and (listed is None or (m.filter or "none") in listed)
        ]
        for key in keys:
            made.append(_group_row(name, key, first, second, bool(aggregate.get("weight_by_size", True)), main=not made))
    return made


def _group_row(
    name: str, key: str, first: Sequence[Answers], second: Sequence[Answers], weighted: bool, *, main: bool
) -> dict[str, Any]:
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if key in a.metrics]
    metric = pairs[0][0].metrics[key]
    sizes = [len(a.items) if weighted else 1 for a, _ in pairs]
    before, after = (
        sum(answers[side].metrics[key].value * size for answers, size in zip(pairs, sizes, strict=True)) / sum(sizes)
        for side in (0, 1)
    )
    parts = [_row(a, b, key, main=False) for a, b in pairs]
    made = row(name_of(name, metric), before, after, metric.unit)
    made |= {"figure": figure_of(name, metric.name, metric.filter, main=main), "items": sum(len(a.items) for a, _ in pairs)}
    made |= {field: parts[0][field] for field in ("better",) if field in parts[0]}
    made |= {field: sum(p[field] for p in parts) for field in ("wins", "losses") if all(field in p for p in parts)}
    if all("chance" in p for p in parts):
        made["chance"] = sum(p["chance"] * size for p, size in zip(parts, sizes, strict=True)) / sum(sizes)
    for field, middle in (("interval", after), ("change_interval", after - before)):
        if all(field in p for p in parts):  # the tasks are independent of each other
            halves = [(p[field][1] - p[field][0]) / 2 * size for p, size in zip(parts, sizes, strict=True)]
            half = float(np.sqrt(np.square(halves).sum())) / sum(sizes)
            made[field] = [middle - half, middle + half]
    return made


def of_prompts(first: Answers, second: Answers, name: str) -> list[dict[str, Any]]:
    """The rows of a file of prompts: how long both models agree, by likeliest words and drawn ones, length, and repetition."""
    check_same(first, second)
    made = []
    both = [*zip(first.items, second.items, strict=True)]
    texts = {"greedy": [(a.tokens, b.tokens) for a, b in both], "sampled": [(a.sampled, b.sampled) for a, b in both]}
    for how, pairs in texts.items():
        own, agree = [len(a) for a, _ in pairs], [agreed(a, b) for a, b in pairs]
        one = row(f"tokens until the first difference, {how} ({name})", float(np.mean(own)), float(np.mean(agree)), "tokens")
        made.append(
            one
            | {"figure": f"{how}_prefix", "text": name, "better": "higher", "items": len(pairs)}
            | _with(intervals.of_mean(agree), intervals.of_change(own, agree))
        )
    for key in first.metrics:
        one = _row(first, second, key, main=False)
        made.append(one | {"figure": key, "text": name})
    return made
