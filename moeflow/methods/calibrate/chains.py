"""What a layer could be instead of what it is, and how these alternatives are divided among chains of forks. No torch."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from moeflow.methods.graph import Calibration
from moeflow.methods.records import Curves
from moeflow.model.spec import HiddenSpec, ObservedSpec
from moeflow.step import Step


@dataclass(frozen=True)
class Forks:
    """The alternatives of one layer: where they come from, and their names."""

    kind: Literal["sets", "each", "files"]
    """The best sets of a layer's candidates, the layer without one or several of its experts, or other files of the layer."""
    names: tuple[str, ...]
    """The name of each: the count that a set keeps, the experts that are left out (`left_out`), or a file's name."""
    replaced: bool = False
    """The layer is itself an alternative already; its last source is the layer as it was."""


@dataclass(frozen=True)
class Alternatives:
    """The alternatives of one layer, and the steps that hold them: one of candidates for "sets", one per name for "files"."""

    forks: Forks
    steps: tuple[Step, ...] = ()
    whole: Step | None = None
    """The layer as it was, if the model has one of its alternatives in its place already."""

    def some(self, names: Collection[str]) -> "Alternatives":
        """Only those with these names."""
        held = self.steps
        if self.forks.kind == "files":
            held = tuple(s for name, s in zip(self.forks.names, held, strict=True) if name in names)
        return replace(self, forks=replace(self.forks, names=tuple(names)), steps=held)

    @property
    def sources(self) -> tuple[Step, ...]:
        """What a chain reads for them."""
        return self.steps if self.whole is None else (*self.steps, self.whole)


@dataclass(frozen=True)
class Chain:
    """Where a chain of forks begins, and on what."""

    first: int
    """The number of its first layer."""
    rows: tuple[tuple[int, int], ...]
    """The sequences of the token matrix that run through it, as runs of (first, count), one for each shard."""
    dtype: str
    listed: int = 0
    """How many alternatives of each layer a shortlist names at most; 0: there is none, and all are measured."""

    def begun(self, which: Forks | None) -> int:
        """How many forks begin in a layer, at most."""
        names = len(which.names) if which else 0
        return min(names, self.listed) if self.listed else names

    @property
    def taken(self) -> list[int]:
        """How many sequences of each shard there are."""
        return [count for _, count in self.rows]


def groups(alternatives: Mapping[int, Alternatives], most: int, listed: int = 0) -> list[dict[int, Alternatives]]:
    """These layers' alternatives in groups of about the same number, `most` at most.

    `listed`: a shortlist names at most so many of each layer's, whichever they are; then no layer is divided.
    """
    if listed:
        size = max(1, most // listed)
        layers = [*alternatives]
        return [{i: alternatives[i] for i in layers[at : at + size]} for at in range(0, len(layers), size)]
    every = [(i, name) for i, of_layer in alternatives.items() for name in of_layer.forks.names]
    count = -(-len(every) // most)
    parts = [every[len(every) * g // count : len(every) * (g + 1) // count] for g in range(count)]
    return [{i: alternatives[i].some([name for j, name in part if j == i]) for i in dict(part)} for part in parts]


def rows_of(calibration: Calibration, tokens: int) -> tuple[tuple[int, int], ...]:
    """The sequences, as runs of (first, count), that hold about `tokens` tokens: the first of every shard, equally many."""
    sizes = [states_of(s.spec.output).sequences for s in calibration.starts]
    each = max(1, round(tokens / calibration.tokens.spec.output.length / len(sizes)))
    return tuple((sum(sizes[:i]), min(each, size)) for i, size in enumerate(sizes))


def taken_of_parts(rows: Sequence[tuple[int, int]], parts: Sequence[int]) -> list[int]:
    """How many of its first sequences each part of a shard has in these rows, the first of every shard; `parts`: their sizes."""
    taken, at = [], 0
    for size in parts:
        taken.append(sum(max(0, min(first + count, at + size) - max(first, at)) for first, count in rows))
        at += size
    return taken


def states_of(spec: Any) -> HiddenSpec:
    """The hidden states in the output of a step of a pass, which may have recorded beside them."""
    return spec.hidden if isinstance(spec, ObservedSpec) else spec


def joined(measured: Iterable[Curves]) -> Curves:
    """What several chains measured, as one."""
    first, *more = measured
    for one in more:
        curves = {i: {**first.curves.get(i, {}), **by_name} for i, by_name in one.curves.items()}
        losses = {i: {**first.losses.get(i, {}), **by_name} for i, by_name in one.losses.items()}
        each = {i: {**first.sequences.get(i, {}), **by_name} for i, by_name in one.sequences.items()}
        first = replace(
            first, curves={**first.curves, **curves}, losses={**first.losses, **losses}, sequences={**first.sequences, **each}
        )
    return first
