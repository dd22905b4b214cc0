"""Two versions or more, side by side: what was measured, which experts stay, what was asked for, and what they were made from."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeflow.report.about import About
from moeflow.report.figures import Figure, Interval, bootstrap, change_between
from moeflow.report.layers import Layer
from moeflow.report.lineage import libraries
from moeflow.report.words import decided
from moeflow.store import Manifest

Figures = Mapping[tuple[str, str], Figure]
"""The figures of a version, by kind and name."""
SEQUENCES = "divergence_of_sequences"
CLOCKED = ("prefill", "decode")
"""The figures that depend on the machine, and on what else it did."""
MATRIX = "data."
"""How the steps begin that make the tokens which a report judges on."""


def compare(versions: Sequence[About]) -> dict[str, Any]:
    """All that differs between versions, as plain values; the first is what the others are held against."""
    return {
        "versions": [
            {"ref": v.title, "key": v.key, "contents": v.manifest.digest, "labels": list(v.version.labels if v.version else ())}
            for v in versions
        ],
        "figures": figures(versions),
        "paired": paired(versions),
        "layers": layers(versions),
        "options": options(versions),
        "lineage": upstream(versions),
    }


def figures(versions: Sequence[About]) -> list[dict[str, Any]]:
    """Every figure that one of them has: the value in each, and its change from the first in per cent.

    `verdicts`: whether the change is for the better, as the page of a version decides it: "undecided" where the interval of the
    change on the same sequences holds both, or where the two lie in each other's intervals, or quartiles, and no more is known.
    `apart`: speeds that were measured on different occasions, of which none is called better: the machine was another, or busier.
    """
    each = [{(f.kind, f.name): f for f in v.figures if f.compressed is not None or f.original is not None} for v in versions]
    rows = []
    for kind, name in dict.fromkeys(k for of in each for k in of):
        known = [of.get((kind, name)) for of in each]
        some = next(f for f in known if f is not None)
        values = [None if f is None else f.compressed for f in known]
        rows.append(
            {
                "kind": kind, "name": name, "figure": some.figure, "text": some.text, "unit": some.unit, "better": some.better,
                "original": _same([f.original for f in known if f is not None]), "values": values,
                "apart": some.figure in CLOCKED and len({f.original for f in known if f is not None}) > 1,
                "intervals": [None if f is None else f.interval for f in known],
                "change": [_per_cent(values[0], value) if at else None for at, value in enumerate(values)],
                "verdicts": [_judgement(versions, each, (kind, name), at) if at else "" for at in range(len(versions))],
            }
        )  # fmt: skip
    return rows


def _judgement(versions: Sequence[About], each: Sequence[Figures], which: tuple[str, str], at: int) -> str:
    """Whether a figure of this version is better than the first's; "" where it is the same, or neither is better."""
    one, other = each[0].get(which), each[at].get(which)
    if one is None or other is None or one.compressed is None or other.compressed is None or not one.better:
        return ""
    change = other.compressed - one.compressed
    if not change:
        return ""
    ours, theirs = (
        {what: raw for text, what, raw in _judged(v) if text == one.text} if one.text else {} for v in (versions[0], versions[at])
    )
    interval = next((change_between(one.figure, ours[what], theirs[what]) for what in ours if what in theirs), None)
    if interval is None:
        first, second = _within(one, each[0]), _within(other, each[at])
        interval = (second[0] - first[1], second[1] - first[0]) if first and second else None
    return decided(change, one.better, interval)


def _within(figure: Figure, others: Figures) -> Interval | None:
    """The interval of a figure, or the quartiles of a speed."""
    ends = [others.get((figure.kind, f"{figure.name}, {end} quartile")) for end in ("lower", "upper")]
    values = [f.compressed for f in ends if f is not None and f.compressed is not None]
    return (values[0], values[1]) if len(values) == 2 else figure.interval


def paired(versions: Sequence[About]) -> list[dict[str, Any]]:
    """How much farther from the original each is than the first, sequence by sequence, on every text that both were judged on.

    A text counts if its tokens are the same in both, and the original, too: a name alone would not do.
    """
    first, *others = ([*_judged(v)] for v in versions)
    rows = []
    for at, other in enumerate(others, 1):
        for text, what, raw in first:
            ours = raw[SEQUENCES]
            theirs = next((of[SEQUENCES] for _, key, of in other if key == what and len(of[SEQUENCES]) == len(ours)), None)
            if theirs is None:
                continue
            difference = np.subtract(theirs, ours)
            interval = bootstrap(difference)
            rows.append(
                {
                    "text": text, "figure": "kl", "version": versions[at].title, "against": versions[0].title,
                    "difference": float(difference.mean()), "interval": interval, "sequences": len(ours),
                    "wins": int((difference < 0).sum()), "losses": int((difference > 0).sum()),
                    "verdict": _verdict(interval) if difference.any() else "the same",
                }
            )  # fmt: skip
    return rows


def _judged(version: About) -> list[tuple[str, tuple[str, str], Mapping[str, Any]]]:
    """The texts that a version was judged on: name, (tokens, original) by their contents, and the report, sequence by sequence."""
    made = []
    for key in version.version.reports if version.version else ():
        manifest, raw = version.made.get(key), version.raw.get(key, {})
        if manifest is None or not raw.get(SEQUENCES):
            continue
        tokens = next((i.digest for i in manifest.inputs if i.key.startswith(MATRIX)), "")
        made.append((str(raw.get("text", "")), (tokens, manifest.inputs[0].digest if manifest.inputs else ""), raw))
    return made


def _verdict(interval: tuple[float, float] | None) -> str:
    if interval is None or interval[0] <= 0 <= interval[1]:
        return "undecided"
    return "closer" if interval[1] < 0 else "farther"


def layers(versions: Sequence[About]) -> list[dict[str, Any]]:
    """Each layer of the original in which they differ: what was done, which experts stay, and the overlap with the first's.

    The overlap is that of the sets of experts that stay, as a part of their union.
    """
    each: list[Mapping[int, Layer]] = [{i.was: i for i in v.checkpoint.layers} if v.checkpoint else {} for v in versions]
    rows = []
    for number in sorted({n for of in each for n in of}):
        of_layer = [of.get(number) for of in each]
        sets = [_stay(layer) for layer in of_layer]
        words = ["gone" if layer is None else layer.words for layer in of_layer]
        if len({*words}) > 1 or len({*sets}) > 1:
            kept = [None if s is None else sorted(s) for s in sets]
            overlap = [_overlap(sets[0], s) if at else None for at, s in enumerate(sets)]
            rows.append({"layer": number, "done": words, "kept": kept, "overlap": overlap})
    return rows


def _stay(layer: Layer | None) -> frozenset[int] | None:
    """The experts of a layer that stay; None if that cannot be told."""
    if layer is None:
        return frozenset()
    if layer.kept is not None:
        return frozenset(layer.kept)
    return None if layer.experts is None else frozenset(range(layer.experts))


def _overlap(one: frozenset[int] | None, other: frozenset[int] | None) -> float | None:
    if one is None or other is None:
        return None
    return len(one & other) / len(one | other) if one | other else 1.0


def options(versions: Sequence[About]) -> list[dict[str, Any]]:
    """The parameters in which they differ, and the pipeline, by what their records say; None where a record does not have one."""
    each = [{"pipeline": v.record.get("pipeline")} | _parameters(v.record) for v in versions]
    names = dict.fromkeys(name for of in each for name in of)
    given = [{str(word).partition("=")[0] for word in v.record.get("given") or ()} for v in versions]
    rows = [{"name": n, "values": [of.get(n) for of in each], "given": [n in words for words in given]} for n in names]
    return [row for row in rows if any(_number(value) != _number(row["values"][0]) for value in row["values"])]


def _number(value: Any) -> Any:
    """The number that a word says, since 0 and 0.0 are the same; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _parameters(record: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(str(word).partition("=")[::2] for word in record.get("given") or ())
    return dict(record.get("parameters") or given)


def upstream(versions: Sequence[About]) -> dict[str, Any]:
    """What differs in what they were made from: sources by their pins, steps by their versions and keys, libraries."""
    shared = frozenset.intersection(*(frozenset(v.lineage) for v in versions))
    groups: list[dict[str, list[Manifest]]] = []
    for v in versions:
        by_step: dict[str, list[Manifest]] = {}
        for manifest in v.lineage.values():
            by_step.setdefault(manifest.step, []).append(manifest)
        groups.append(by_step)
    steps = []
    for name in dict.fromkeys(name for of in groups for name in of):
        own = [[m for m in of.get(name, ()) if m.key not in shared] for of in groups]
        if any(own):
            numbers = [sorted({m.version for m in of.get(name, ())}) for of in groups]
            steps.append({"step": name, "versions": numbers, "keys": [len(of) for of in own]})
    used = [libraries(v.lineage) for v in versions]
    names = sorted({name for of in used for name in of})
    return {
        "keys": [len(v.lineage) for v in versions],
        "shared": len(shared),
        "sources": _sources(versions),
        "steps": steps,
        "libraries": [
            {"name": name, "versions": [of.get(name, []) for of in used]}
            for name in names
            if any(of.get(name) != used[0].get(name) for of in used)
        ],
    }


def _sources(versions: Sequence[About]) -> list[dict[str, Any]]:
    """The sources that are not the same in all: how many files each has pinned otherwise than the first, None for none."""
    rows = []
    for uri in dict.fromkeys(uri for v in versions for uri in v.sources):
        pins = [v.sources.get(uri) for v in versions]
        if any(p != pins[0] for p in pins):
            first = pins[0] or {}
            others = [None if p is None else sum(first.get(n) != pin for n, pin in p.items()) + len({*first} - {*p}) for p in pins]
            rows.append({"uri": uri, "files": [None if p is None else len(p) for p in pins], "differ": others})
    return rows


def _same(values: Sequence[float | None]) -> float | None:
    """The value that all have; None if they differ."""
    return values[0] if all(v == values[0] for v in values) else None


def _per_cent(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None or not before else 100 * (after - before) / abs(before)
