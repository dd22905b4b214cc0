"""The figures of a version: every row of its reports as a typed value, with intervals where the reports tell enough for them.

An interval is the middle 95 % of `DRAWS` means over sequences that are drawn again and again with replacement (the bootstrap,
seeded, so that it is the same whenever it is asked for); where two models were measured on the same sequences, both are drawn
together.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeflow.report.table import raw_reports
from moeflow.store import Store

DRAWS = 2_000
PART = 95.0  # per cent of the draws that lie in an interval
FEWEST = 2
"""Fewer sequences tell nothing of how much they vary."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """One measurement of a version, beside its original's; None where it was not measured."""

    figure: str
    """The short word by which a gate names it: "kl", "bytes", "gsm8k"; "" for a row that no gate can name."""
    name: str
    """The row's own name, as the table has it."""
    kind: str
    """The kind of the report: "quality", "size", "speed"."""
    unit: str
    original: float | None
    compressed: float | None
    text: str = ""
    """The text or domain that it was measured on."""
    better: str = ""
    """"lower", "higher", or "" where neither is."""
    interval: Interval | None = None
    """Of the compressed value, 95 %."""
    change_interval: Interval | None = None
    """Of compressed minus original, 95 %, paired by item."""
    chance: float | None = None
    """What guessing scores, in the same unit."""
    items: int | None = None
    """How many items or sequences were judged."""
    wins: int | None = None
    """Items that only the compressed model has right."""
    losses: int | None = None
    """Items that only the original has right."""
    notes: tuple[str, ...] = ()
    """What its report says besides: why there is no value, for one."""
    report: str = ""
    """The key of the step that reported it."""

    @property
    def word(self) -> str:
        """How a gate names exactly this figure: "kl[prose]", or "bytes"."""
        return f"{self.figure}[{self.text}]" if self.text else self.figure

    @property
    def change(self) -> float | None:
        """Compressed minus original; None if either was not measured."""
        return None if self.original is None or self.compressed is None else self.compressed - self.original


def read_figures(store: Store, reports: Iterable[str]) -> tuple[Figure, ...]:
    """The figures of these reports (`Version.reports`) in their order, with rows that no gate can name. Raises NotStored."""
    return tuple(figure for key, raw in raw_reports(store, reports) for figure in figures_of(raw, key))


def figures_of(raw: Mapping[str, Any], key: str = "") -> tuple[Figure, ...]:
    """The figures of one report as it is stored."""
    return tuple(_figure(row, raw, key) for row in raw.get("rows", ()))


def _figure(row: Mapping[str, Any], raw: Mapping[str, Any], key: str) -> Figure:
    figure = str(row.get("figure", ""))
    drawn = _of_sequences(figure, raw) if raw.get("text") == row.get("text") else {}
    known = drawn | {name: row[name] for name in ("chance", "items", "wins", "losses") if row.get(name) is not None}
    known |= {name: _interval(row[name]) for name in ("interval", "change_interval") if row.get(name) is not None}
    return Figure(
        figure, str(row["name"]), str(raw.get("kind", "")), str(row.get("unit", "")),
        _number(row.get("original")), _number(row.get("compressed")), str(row.get("text", "")), str(row.get("better", "")),
        notes=tuple(raw.get("notes", ())), report=key, **known,
    )  # fmt: skip


def _of_sequences(figure: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The intervals of a figure that a report tells sequence by sequence, and of how many; nothing for others."""
    if figure == "kl" and "divergence_of_sequences" in raw:
        values = raw["divergence_of_sequences"]
        return {"interval": bootstrap(values), "items": len(values)}
    if figure == "agreement" and "agreement_of_sequences" in raw:
        values = raw["agreement_of_sequences"]
        return {"interval": bootstrap(values), "change_interval": bootstrap(np.subtract(values, 1.0)), "items": len(values)}
    if figure in ("loss", "perplexity") and "losses_of_sequences" in raw:
        before, after = (np.asarray(values, float) for values in raw["losses_of_sequences"])
        if figure == "loss":
            return {"interval": bootstrap(after), "change_interval": bootstrap(after - before), "items": len(after)}
        drawn = _draws([before, after])
        if drawn is None:
            return {"items": len(after)}
        first, second = (np.exp(means) for means in drawn)
        return {"interval": _middle(second), "change_interval": _middle(second - first), "items": len(after)}
    return {}


def change_between(figure: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Interval | None:
    """The 95 % interval of a figure in the report `other` minus that in `one`, on the same sequences; None if they do not tell."""
    before, after = (_of_each_sequence(figure, raw) for raw in (one, other))
    drawn = None if before is None or after is None or len(before) != len(after) else _draws([before, after])
    if drawn is None:
        return None
    first, second = (np.exp(means) for means in drawn) if figure == "perplexity" else drawn
    return _middle(second - first)


def _of_each_sequence(figure: str, raw: Mapping[str, Any]) -> np.ndarray | None:
    """What the compressed model's figure is a mean of (of its logarithm, if it is the perplexity); None if a report lacks it."""
    name = {"kl": "divergence_of_sequences", "agreement": "agreement_of_sequences"}.get(figure, "losses_of_sequences")
    values = raw.get(name) if figure in ("kl", "agreement", "loss", "perplexity") else None
    return None if values is None else np.asarray(values[1] if name == "losses_of_sequences" else values, float)


def bootstrap(values: Sequence[float] | np.ndarray) -> Interval | None:
    """The 95 % interval of the mean of these values [N]; None for too few of them, or if any is not finite."""
    drawn = _draws([np.asarray(values, float)])
    return None if drawn is None else _middle(drawn[0])


def _draws(columns: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """The means [DRAWS] of each column [N], the same items drawn from all columns; None where they say nothing."""
    n = len(columns[0])
    if n < FEWEST or not all(np.isfinite(values).all() for values in columns):
        return None
    random = np.random.default_rng(0)
    weights = random.multinomial(n, np.full(n, 1 / n), size=DRAWS) / n  # how often each item was drawn, [DRAWS, N]
    return [weights @ values for values in columns]


def _middle(means: np.ndarray) -> Interval:
    low, high = np.percentile(means, [(100 - PART) / 2, (100 + PART) / 2])
    return float(low), float(high)


def sayable(value: Any) -> Any:
    """The same value as JSON can say it: a number that is none, as a broken model has it, becomes the word "nan" or "inf"."""
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: sayable(v) for k, v in value.items()}
    return [sayable(v) for v in value] if isinstance(value, list | tuple) else value


def _interval(value: Sequence[float]) -> Interval:
    low, high = value
    return float(low), float(high)


def _number(value: Any) -> float | None:
    """A value as a number; None for one that was not measured, and for words."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
