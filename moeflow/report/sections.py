"""The sections of a version's page: each from what is stored of the version, None if nothing is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from moeflow.report import charts, layers
from moeflow.report.about import About
from moeflow.report.charts import Point, Range
from moeflow.report.figures import Figure
from moeflow.report.layers import Layer
from moeflow.report.table import shown
from moeflow.report.words import DISTANCES, change, meaning
from moeflow.sizes import bytes_text
from moeflow.store import NotStored, StoreError

TRAIN, TRAINING = "finetune.train", "training.json"
JUDGED = ("quality", "tasks", "prompts")
"""The kinds of reports on how good a model is."""
SHOWN = 24
"""So many texts are shown side by side."""
KEY = Markup('<span class="key"><i class="before"></i>original <i class="after"></i>this model</span>')


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: tuple[int, ...] = ()
    """The columns that are set to the right."""
    total: bool = False
    """Whether the last row is a sum."""
    title: str = ""
    """If it is folded away, what it is called."""


@dataclass(frozen=True)
class Pair:
    """What two models write behind a prompt."""

    prompt: str
    original: str
    compressed: str


@dataclass(frozen=True)
class Section:
    title: str
    words: str
    """A sentence or two on how to read it."""
    charts: tuple[tuple[str, Markup], ...] = ()
    """Pictures with what stands above each."""
    tables: tuple[Table, ...] = ()
    pairs: tuple[Pair, ...] = ()
    after: str = ""
    key: Markup | str = ""
    """What the colours mean."""
    code: str = ""


def of_checkpoint(about: About) -> list[Section]:
    """What was done to each layer, which experts stay, and what that changed."""
    checkpoint = about.checkpoint
    if checkpoint is None or not checkpoint.layers:
        return []
    made = [_experts(checkpoint.layers, about.usage), _changes(checkpoint.layers)]
    return [section for section in made if section is not None]


def _experts(every: Sequence[Layer], usage: Mapping[int, Sequence[float]]) -> Section | None:
    rows = []
    for layer in every:
        use = usage.get(layer.was, ())
        if count := layer.experts or len(use):
            rows.append((layer.was, count, None if layer.kept is None else frozenset(layer.kept), use))
    here = {layer.was for layer in every}
    rows += [(i, len(use), frozenset[int](), use) for i, use in usage.items() if i not in here]  # decoder layers that are gone
    rows.sort(key=lambda row: row[0])
    some = any(kept is not None for _, _, kept, _ in rows)
    words = "A row is a layer, a cell an expert of the original. "
    words += "The stronger its colour, the more of the calibration's tokens it computed. " if any(use for *_, use in rows) else ""
    words += "Crossed out is what went." if some else "All experts stay."
    detail = [
        (numbers, *("-" if n is None else str(n) for n in (layer.experts, layer.now)), layer.words)
        for numbers, layer in layers.alike(every)
    ]
    stay = [(str(i), _spans(kept), _share(kept, use)) for i, _, kept, use in rows if kept is not None]
    head = ("layer", "experts that stay", "of what the router asked for")
    tables = [Table(("layers", "experts before", "now", "what was done"), detail, right=(1, 2))]
    tables += [Table(head, stay, right=(2,), title="Which experts stay")] if stay else []
    return Section("What was kept", words, (("Experts by layer", charts.experts(rows)),) if rows else (), tuple(tables))


def _share(kept: frozenset[int], use: Sequence[float]) -> str:
    """The part of the calibration's routed tokens whose expert stays."""
    total = sum(use)
    return f"{sum(u for e, u in enumerate(use) if e in kept) / total:.1%}" if total else "-"


def _spans(numbers: frozenset[int]) -> str:
    """0 to 3, 7, 9: numbers with neighbours drawn together."""
    spans: list[list[int]] = []
    for n in sorted(numbers):
        if spans and spans[-1][-1] == n - 1:
            spans[-1].append(n)
        else:
            spans.append([n])
    words = (f"{s[0]} to {s[-1]}" if len(s) > 2 else ", ".join(map(str, s)) for s in spans)
    return ", ".join(words) or "none"


def _changes(every: Sequence[Layer]) -> Section | None:
    parts = {
        "How far its output moved, as a part of its norm": [(str(i.layer), i.error) for i in every if i.error is not None],
        "KL of the whole model if only this layer is so, nats a token": [
            (str(i.layer), max(0.0, i.divergence)) for i in every if i.divergence is not None
        ],
        "Mean error of its experts' matrices by rounding or lower ranks": [
            (str(i.layer), i.lost) for i in every if i.lost is not None
        ],
    }
    pictures = tuple((name, charts.bars(values, axis="", log=True)) for name, values in parts.items() if any(v for _, v in values))
    return Section("Error by layer", "What each layer cost, where it was measured.", pictures) if pictures else None


def frontier(about: About) -> Section | None:
    """What other budgets would have cost, where a fit measured it."""
    made = [c for c in (about.checkpoint.choices if about.checkpoint else ()) if c.get("frontier") and c.get("whole")]
    if not made:
        return None
    fit = made[-1]
    whole, unit = float(fit["whole"]), str(fit.get("unit", "bytes"))
    points = [Point(100 * p["size"] / whole, p["cost"], f"{p['size'] / whole:.0%}: {p['cost']:.3g}") for p in fit["frontier"]]
    points += [
        Point(100 * p["size"] / whole, p["cost"], f"{name}: {p['cost']:.3g}", "mark")
        for name, p in (fit.get("marks") or {}).items()
    ]
    points.append(Point(100 * fit["size"] / whole, fit["cost"], f"this model: {fit['cost']:.3g}", "here"))
    words = (
        f"The least divergence that was predicted at each size, in per cent of the original's {unit}. The large dot is this "
        "model; the hollow ones are the papers' recipes, one alternative for all layers."
    )
    rows = [
        (name, _amount(p["size"], unit), f"{p['size'] / whole:.0%}", f"{p['cost']:.3g}")
        for name, p in sorted((fit.get("marks") or {}).items(), key=lambda item: item[1]["size"])
    ]
    rows = [("this model", _amount(fit["size"], unit), f"{fit['size'] / whole:.0%}", f"{fit['cost']:.3g}"), *rows]
    table = Table(("recipe", unit, "of the original", "predicted KL"), rows, right=(1, 2, 3), title="The recipes in numbers")
    picture = charts.plane(points, x=f"per cent of the {unit}", y="predicted KL, nats a token")
    return Section("What other sizes would cost", words, (("", picture),), (table,))


def _amount(size: float, unit: str) -> str:
    return bytes_text(size) if unit in ("bytes", "resident") else f"{size:,.0f}"


def quality(about: About) -> Section | None:
    """Quality by text and by task, with intervals."""
    judged = [f for f in about.figures if f.compressed is not None and (f.text or f.kind in JUDGED)]
    if not judged:
        return None
    groups: dict[str, list[Figure]] = {}
    for f in judged:
        groups.setdefault(_group(f), []).append(f)
    pictures = []
    for name, of in groups.items():
        if any(f.interval for f in of):
            above = meaning(of[0]) or name
            pictures.append((f"{name}: {above}" if above != name else name, charts.ranges([*map(_range, of)], zero=_from_zero(of))))
    rows = [(f.name, shown(f.original, f.unit), shown(f.compressed, f.unit), change(f), _items(f, about)) for f in judged]
    table = Table(("", "original", "this model", "change", "judged on"), rows, right=(1, 2))
    words = "Lines are 95 % intervals: what another sample of the same kind of text would give."
    return Section("How good it is", words if pictures else "", tuple(pictures), (table,), key=KEY if pictures else "")


def _group(f: Figure) -> str:
    """The name of the picture that a figure stands in: one for each measure of text, and one for the scores of tasks."""
    if f.kind == "tasks" and all(0 <= (v or 0) <= 1 for v in (f.original, f.compressed)):
        return "scores of tasks"
    return f.name.partition(" (")[0] if f.text else f.name


def _range(f: Figure) -> Range:
    original = None if f.figure in DISTANCES else f.original
    return Range(f.text or f.name, f.compressed or 0.0, f.interval, original, None, f.chance, shown(f.compressed, f.unit))


def _from_zero(of: Sequence[Figure]) -> bool:
    return all((f.compressed or 0.0) >= 0 for f in of) and of[0].figure in ("kl", "layer_error")


def _items(f: Figure, about: About) -> str:
    """What a figure was judged on: sequences with their tokens, prompts, or the items of a task."""
    what = {"quality": "sequences", "prompts": "prompts"}.get(f.kind, "items")
    tokens = next((raw["tokens"] for raw in about.of_kind(f.kind) if f.text and raw.get("text") == f.text and raw.get("tokens")), 0)
    words = [f"{f.items:,} {what}{f' of {tokens // f.items + 1:,} tokens' if tokens else ''}"] if f.items else []
    if f.wins is not None and f.losses is not None:
        words.append(f"{f.wins:,} won, {f.losses:,} lost")
    return ", ".join(words)


def written(about: About) -> Section | None:
    """What both models write behind the same words."""
    pairs = generations(about)
    words = "Both models go on from the same words, each by its likeliest next token."
    more = f"{len(pairs) - SHOWN:,} more are in its reports: moeflow show {about.title} --json" if len(pairs) > SHOWN else ""
    return Section("What it writes", words, pairs=pairs[:SHOWN], after=more) if pairs else None


def generations(about: About) -> tuple[Pair, ...]:
    """What both models wrote, behind one prompt or behind each of a file of them."""
    one = [raw for raw in about.of_kind("written") if "prompt" in raw]
    several = [of for raw in about.of_kind("prompts") for of in raw.get("written") or () if isinstance(of, Mapping)]
    both = [of for of in (*one, *several) if "original" in of and "compressed" in of]
    return tuple(Pair(str(of.get("prompt", "")), str(of["original"]), str(of["compressed"])) for of in both)


def speed(about: About, kind: str = "speed", title: str = "How fast it is") -> Section | None:
    """Speed beside the original's, with quartiles, of the reports of one kind."""
    rows = {
        str(row["name"]): row for raw in about.of_kind(kind) for row in raw.get("rows", ()) if row.get("compressed") is not None
    }
    both = [name for name in rows if f"{name}, lower quartile" in rows and f"{name}, upper quartile" in rows]
    if not both:
        return None
    pictures = []
    for name in both:
        low, high = (rows[f"{name}, {end} quartile"] for end in ("lower", "upper"))
        after, before = ((float(low[side]), float(high[side])) for side in ("compressed", "original"))
        of = Range("", float(rows[name]["compressed"]), after, float(rows[name]["original"]), before)
        pictures.append((f"{name}, tokens a second", charts.ranges([of], zero=False)))
    facts: Mapping[str, Any] = next((raw["machine"] for raw in about.of_kind(kind) if isinstance(raw.get("machine"), Mapping)), {})
    on = ", ".join(facts.get("gpus") or ()) or str(facts.get("processor", ""))
    where = f", on {on}" if on else ""
    words = f"Medians, with the quartiles of alternating rounds{where}. Where the lines overlap, no difference was measured."
    return Section(title, words, tuple(pictures), key=KEY)


def training(about: About) -> Section | None:
    """The course of each fine-tuning."""
    pictures = []
    for manifest in about.lineage.values():
        if manifest.step != TRAIN:
            continue
        try:
            curve = json.loads(about.store.artifact(manifest.key).file(TRAINING).read_text())
        except (NotStored, StoreError, FileNotFoundError):
            continue  # gone, as after `moeflow gc --keep-results`
        lines: dict[str, list[tuple[float, float]]] = {"training": [(i + 1.0, v) for i, v in enumerate(curve["losses"])]}
        for v in curve["validations"]:
            for name, loss in v["losses"].items():
                lines.setdefault(name, []).append((float(v["steps"]), loss))
        held = [name for name in lines if name != "training"]
        title = "Loss by step: the line is the training batch" + (f", the dots are {', '.join(held)}" if held else "")
        pictures.append((title, charts.curves(lines, x="step", y="nats a token")))
    return Section("How it was trained", "", tuple(pictures)) if pictures else None
