"""The gate: bounds on the figures of a version, which decide whether a label may point at it.

A bound is written as people say it: `kl<0.02`, `bytes<=24GB`, `agreement>=95%`, `gsm8k>=0.95x` (of the original's) or
`kl<=1.1x promoted` (of the version that the label points at). Without a text, `kl` is asked on every text and the worst counts;
`kl[prose]` names one. docs/promote.md says it all.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from moeflow.nearest import meant
from moeflow.report.figures import Figure
from moeflow.step import Step

Of = Literal["", "original", "promoted"]
State = Literal["holds", "fails", "undecidable"]

SIZES = {f"{prefix}{unit}": base**n for base, unit in ((1000, "B"), (1024, "iB")) for n, prefix in enumerate("KMGT", 1)} | {"B": 1}
BOUND = re.compile(
    r"\s*(?P<figure>[A-Za-z_][\w./:-]*?)\s*(\[(?P<text>[^\[\]]+(\[[^\[\]]*\][^\[\]]*)*)\])?\s*(?P<sign><=|>=|<|>)\s*"
    rf"(?P<number>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)\s*((?P<unit>%|{'|'.join(SIZES)})|(?P<times>x)(?P<promoted>\s+promoted)?)?\s*"
)
HOW = "write a bound like kl<0.02, bytes<=24GB, agreement>=95%, gsm8k>=0.95x or 'kl<=1.1x promoted'"
ENDS = (".yaml", ".yml")
SURE = 1.96  # standard errors on each side of an interval of 95 %


@dataclass(frozen=True)
class Bound:
    """What one figure must be, on one text or on all of them (""): at most or at least `value`, or `value` times a reference."""

    figure: str
    text: str
    sign: Literal["<", "<=", ">", ">="]
    value: float
    of: Of = ""
    """What `value` is a multiple of: the original's figure, or that of the version that is promoted now; "": of nothing."""
    size: bool = False
    """Whether it was written in bytes."""
    word: str = ""
    """The bound as it was written."""

    @property
    def upper(self) -> bool:
        return self.sign.startswith("<")

    def holds(self, value: float, limit: float) -> bool:
        """Whether a value keeps the bound; one that is no number does not."""
        compared = {"<": value < limit, "<=": value <= limit, ">": value > limit, ">=": value >= limit}
        return compared[self.sign] and not math.isnan(value)


@dataclass(frozen=True)
class Decision:
    """What the gate says of one bound."""

    bound: str
    state: State
    why: str
    """In a sentence, with the figure, its value and the limit."""
    figure: str = ""
    compressed: float | None = None
    limit: float | None = None


def bound(word: str) -> Bound:
    """Read one bound. Raises ValueError with how to write it."""
    match = BOUND.fullmatch(word)
    if match is None:
        raise ValueError(f"--gate {word!r} is no bound: {HOW}")
    unit, value = match["unit"] or "", float(match["number"])
    if not math.isfinite(value):
        raise ValueError(f"--gate {word!r}: {match['number']} is too large; {HOW}")
    of: Of = "promoted" if match["promoted"] else "original" if match["times"] else ""
    if of and value <= 0:
        raise ValueError(f"--gate {word!r}: {match['number']}x says nothing; give a factor above 0, as in gsm8k>=0.95x")
    value *= 0.01 if unit == "%" else SIZES.get(unit, 1)
    return Bound(match["figure"], match["text"] or "", match["sign"], value, of, unit in SIZES, " ".join(word.split()))  # type: ignore[arg-type]


def read_gate(words: Iterable[str]) -> tuple[Bound, ...]:
    """The bounds of `--gate`: each word is a bound, or a gate.yaml with a list of them. Raises ValueError, OSError."""
    bounds = (one for word in words for one in (_of_file(Path(word)) if word.endswith(ENDS) else [bound(word)]))
    return tuple({b.word: b for b in bounds}.values())


def _of_file(path: Path) -> list[Bound]:
    """The bounds in a file: a list, or a list under `bounds:`. Raises ValueError with the file's name."""
    if not path.is_file():
        raise ValueError(f"there is no gate file {path}; {HOW}, or name a gate.yaml with a list of them")
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if isinstance(raw, dict):
        if unknown := [key for key in raw if key != "bounds"]:
            raise ValueError(f"{path}: {unknown[0]!r} is not known; write a list of bounds under bounds:")
        raw = raw["bounds"] if raw else None
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"{path} holds no list of bounds; write a line for each, as in `- kl < 0.02`")
    bounds = []
    for n, word in enumerate(raw, 1):
        if not isinstance(word, str):
            raise ValueError(f"{path}, bound {n}: {word!r} is no text; {HOW}")
        try:
            bounds.append(bound(word))
        except ValueError as error:
            raise ValueError(f"{path}, bound {n}: {str(error).removeprefix('--gate ')}") from None
    return bounds


def check_measured(gate: Iterable[Bound], target: Step) -> None:
    """Raise ValueError if a bound names a figure, or a text, that no reporting step of this graph says it measures."""
    words = sorted({word for report in target.reports for word in report.spec.figures})
    known = {word: _split(word) for word in words}
    for one in gate:
        texts = [text for figure, text in known.values() if figure == one.figure]
        if one.text in texts or (texts and not one.text):
            continue
        if texts:
            measured = " and ".join(dict.fromkeys(f"{one.figure}[{text}]" if text else one.figure for text in texts))
            raise ValueError(
                f"the gate asks for {one.figure}[{one.text}], and this pipeline measures {measured}; name one of these"
            )
        names = sorted({figure for figure, _ in known.values()})
        advice = meant(one.figure, names, f"it measures {', '.join(names) or 'nothing'}")
        raise ValueError(f"the gate asks for {one.figure}, which no step of this pipeline measures ({one.word}); {advice}")


def judge(gate: Iterable[Bound], figures: Sequence[Figure], promoted: Sequence[Figure] | None = None) -> tuple[Decision, ...]:
    """What the gate says of these figures, a decision for each bound.

    `promoted`: the figures of the version that the label points at now; None if it points at nothing yet: a bound against it
    holds then.
    """
    return tuple(_decided(one, figures, promoted) for one in gate)


def passed(decisions: Iterable[Decision]) -> bool:
    return all(d.state == "holds" for d in decisions)


def refusal(decisions: Iterable[Decision]) -> str:
    """Why the gate is not passed, in one line; "" if it is."""
    return "; ".join(d.why for d in decisions if d.state != "holds")


def _decided(one: Bound, figures: Sequence[Figure], promoted: Sequence[Figure] | None) -> Decision:
    """The decision on the worst text, of those that the bound is asked on."""
    asked = [f for f in figures if f.figure == one.figure and one.text in ("", f.text)]
    if not asked:
        name = f"{one.figure}[{one.text}]" if one.text else one.figure
        return Decision(one.word, "undecidable", f"{one.word}: {name} was not measured; run the pipeline with a report that has it")
    decisions = [_of_figure(one, figure, promoted) for figure in asked]
    order: list[State] = ["undecidable", "fails", "holds"]
    worst = min(order.index(d.state) for d in decisions)
    last = [d for d in decisions if order.index(d.state) == worst]
    return (max if one.upper else min)(last, key=lambda d: _or_zero(d.compressed))


def _or_zero(value: float | None) -> float:
    return 0.0 if value is None or math.isnan(value) else value


def _of_figure(one: Bound, figure: Figure, promoted: Sequence[Figure] | None) -> Decision:
    value = figure.compressed

    def undecidable(why: str) -> Decision:
        return Decision(one.word, "undecidable", f"{one.word} cannot be decided: {why}", figure.word, value)

    if value is None:
        return undecidable(f"{figure.name} was not measured{''.join(f' ({note})' for note in figure.notes[:1])}")
    if one.size and figure.unit not in ("B", "bytes"):
        return undecidable(f"{figure.name} is no size in bytes but in {figure.unit or 'numbers without a unit'}")
    limit, against = one.value, ""
    if one.of == "promoted" and promoted is None:
        return Decision(one.word, "holds", f"{one.word}: nothing is promoted yet to compare with", figure.word, value)
    if one.of:
        reference = figure.original if one.of == "original" else _same(figure, promoted or ())
        whose = "the original's" if one.of == "original" else "the promoted version's"
        if reference is None:
            return undecidable(f"{whose} {figure.word} was not measured")
        if why := _says_nothing(figure, reference, whose):
            return undecidable(why)
        limit, against = one.value * reference, f" ({one.value:g} times {whose} {reference:.4g})"
    low, high = _ends(one, figure, value)
    state: State = "holds" if all(one.holds(v, limit) for v in (value, high if one.upper else low)) else "fails"
    between = f" ({low:.4g} to {high:.4g})" if low != high else ""
    text = f"{figure.word} is {value:.4g}{between}, and {one.sign} {limit:.4g}{against} {state}"
    return Decision(one.word, state, text, figure.word, value, limit)


def _ends(one: Bound, figure: Figure, value: float) -> tuple[float, float]:
    """The interval that must keep the bound: against the original that of the paired change, where it was measured."""
    if one.of == "original" and figure.change_interval is not None and figure.original is not None:
        low, high = (figure.original + change for change in figure.change_interval)
        return low, high
    return figure.interval or (value, value)


def _same(figure: Figure, others: Iterable[Figure]) -> float | None:
    """The value of the same figure, on the same text, of another version."""
    return next((o.compressed for o in others if o.word == figure.word), None)


def _says_nothing(figure: Figure, reference: float, whose: str) -> str:
    """Why a multiple of this reference bounds nothing: it is zero or no number, or no better than guessing; "" if it does."""
    if not math.isfinite(reference) or reference == 0:
        return f"{whose} {figure.word} is {reference:g}, and a multiple of that bounds nothing; write an absolute bound"
    if figure.chance is None:
        return ""
    margin = 0.0
    if figure.items and 0 < figure.chance < 1:
        margin = SURE * math.sqrt(figure.chance * (1 - figure.chance) / figure.items)
    better = reference < figure.chance - margin if figure.better == "lower" else reference > figure.chance + margin
    if better:
        return ""
    within = f", as far as {figure.items} items can tell" if margin else ""
    return (
        f"{whose} {figure.word} of {reference:.4g} is no better than guessing, which scores {figure.chance:.4g}{within}; "
        "write an absolute bound, or take a task that it can do"
    )


def _split(word: str) -> tuple[str, str]:
    """Figure and text of "kl[prose]"."""
    figure, _, text = word.partition("[")
    return figure, text.removesuffix("]")
