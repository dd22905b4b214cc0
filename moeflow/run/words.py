"""Numbers, sizes and steps as text for people. No I/O."""

import json
import math
from collections import defaultdict
from typing import Any

from moeflow.run.outcome import Outcome
from moeflow.sizes import bytes_text as size
from moeflow.step import Step


def summary(outcome: Outcome) -> str:
    parts = [f"{len(outcome.ran):,} run", f"{outcome.stored:,} stored"]
    if outcome.aliased:
        parts.append(f"{outcome.aliased:,} with the same content as stored ones")
    if spared := len(outcome.keys("not needed")):
        parts.append(f"{spared:,} not needed")
    return f"{count(len(outcome.steps), 'step')}: {', '.join(parts)}, {outcome.seconds:.1f} s"


def labels(steps: list[Step]) -> dict[str, str]:
    """A short label for each key: the step's name, and the parameters that differ among the steps of that name."""
    groups: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        groups[step.name].append(step)
    names = {}
    for name, group in groups.items():
        values: dict[str, set[str]] = defaultdict(set)
        for step in group:
            for key, value in step.params.items():
                values[key].add(json.dumps(value))
        telling = [key for key, distinct in values.items() if len(distinct) > 1]
        for step in group:
            words = [word for key in telling if (word := _word(key, step.params.get(key)))]
            while len(words) > 1 and len(" ".join(words[:3])) > 32:  # the longest word says least
                words.sort(key=len)
                words.pop()
            names[step.key] = " ".join([name, *words[:3]])
    return names


def _word(key: str, value: Any) -> str:
    """A parameter in a label; empty if it is too long to help."""
    numbers = isinstance(value, list) and bool(value) and all(type(v) is int for v in value)
    if numbers and value == list(range(value[0], value[-1] + 1)):
        return f"{key} {value[0]}-{value[-1]}" if len(value) > 1 else f"{key} {value[0]}"
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{key} {text}" if len(text) <= 32 else ""


def amount(done: int, total: int, unit: str) -> str:
    """`4,096/8,192 tokens`, and bytes in units that people read."""
    if unit == "bytes":
        return f"{size(done)}/{size(total)}" if total else size(done)
    return f"{done:,}/{total:,} {unit}" if total else f"{done:,} {unit}"


def many(n: float) -> str:
    """A large number in the units of operations: `3.1 T`, `870 P`; empty for zero."""
    units = ("", "k", "M", "G", "T", "P", "E", "Z")
    digits = float(f"{n:.3g}")
    at = min(len(units) - 1, int(math.log10(digits) / 3 + 1e-9)) if digits >= 1 else 0
    return f"{digits / 1000**at:.3g} {units[at]}".strip() if n else ""


def span(seconds: float) -> str:
    """A time to plan with: `40 s`, `12 min`, `6.3 h`."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:,.1f} h"


def clock(seconds: float) -> str:
    """`00:12`, or `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def count(n: int, word: str, ending: str = "s") -> str:
    return f"{n:,} {word}{ending * (n != 1)}"
