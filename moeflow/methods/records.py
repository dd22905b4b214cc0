"""Records of decisions and measurements: small JSON files that people can read and diff, all written and read here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from moeflow import options
from moeflow.step import Artifact


def read_json(artifact: Artifact, name: str) -> Any:
    return json.loads(bytes(artifact.read(name, 0, artifact.size(name))))


class Record:
    """A frozen dataclass stored as one JSON file; fields at their default are left out of the file."""

    FILE: ClassVar[str]
    LEVELS: ClassVar[int] = 2
    """So many levels are spread over lines; below them a dictionary of lists stands on one."""

    def write(self, folder: Path) -> None:
        (folder / self.FILE).write_text(_lines(options.plain(self), 0, self.LEVELS) + "\n")

    @classmethod
    def read(cls, artifact: Artifact) -> Self:
        record: Self = options.restored(read_json(artifact, cls.FILE), cls)
        return record


@dataclass(frozen=True)
class ExpertSet:
    """A set of experts that may stay in a layer, and what it costs."""

    keep: tuple[int, ...]
    """The experts that stay, ascending."""
    loss: float
    """How far the layer's output moves, in the norm that the search minimises."""
    of_output: float
    """The loss as a fraction of the output's norm."""

    @classmethod
    def of(cls, keep: tuple[int, ...], loss: float, norm: float) -> Self:
        """This set, whose loss is taken relative to the output's `norm`."""
        return cls(keep, loss, loss / norm if norm else 0.0)


@dataclass(frozen=True)
class LayerLoss:
    """The loss of a layer's chosen set."""

    kind: str
    """frobenius: the norm over all tokens; batch-sum: the sum of the norms of all batches."""
    value: float
    of_output: float
    """The value as a fraction of the same norm of the output."""
    tokens: int
    """The tokens that it was measured on."""


@dataclass(frozen=True)
class Choice(Record):
    """The experts of one layer that stay."""

    FILE = "choice.json"

    layer: int
    experts: int
    """How many experts the layer had."""
    keep: tuple[int, ...]
    """The experts that stay, ascending."""
    criterion: str
    """The search, or the score, that chose them."""
    loss: LayerLoss | None
    """None if it was chosen by a score, and not measured."""
    runner_up: ExpertSet | None
    """The second best set, if the search evaluated one."""
    baselines: Mapping[str, ExpertSet]
    """The set that each score would keep; empty if none was measured."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """The loss of every compared set, keyed by its experts joined with commas; empty if another step compared them."""


@dataclass(frozen=True)
class Sets:
    """The sets that a search found for one number of experts."""

    best: tuple[ExpertSet, ...]
    """Different sets, best first."""
    baselines: Mapping[str, ExpertSet]
    """The set that each score would keep."""


@dataclass(frozen=True)
class Candidates(Record):
    """Sets of one layer's experts, from which a later step chooses."""

    FILE = "candidates.json"

    layer: int
    experts: int
    """How many experts the layer has."""
    method: str
    """The search that found them."""
    tokens: int
    """The tokens that they were compared on."""
    norm: float
    """The norm of the layer's output on these tokens."""
    counts: Mapping[int, Sets]
    """The sets for each number of experts that may stay."""

    @property
    def only(self) -> Sets:
        """The sets of the one number of experts that was searched. Raises ValueError if there were several."""
        (sets,) = self.counts.values()
        return sets


@dataclass(frozen=True)
class Combination:
    """One set of each layer of a span."""

    sets: tuple[int, ...]
    """For each layer, the index of its set among the layer's best."""
    loss: float
    """The norm of the change in the span's output."""


@dataclass(frozen=True)
class Combinations(Record):
    """Every combination of the sets of a span of layers."""

    FILE = "span.json"

    layers: tuple[int, ...]
    """The layers whose sets are combined."""
    combinations: tuple[Combination, ...]
    """Best first."""


@dataclass(frozen=True)
class Spread:
    """Another way to spread the same number of experts over the layers."""

    counts: tuple[int, ...]
    """The number of experts of each layer, in the order of the layers."""
    cost: float


@dataclass(frozen=True)
class KeptCounts(Record):
    """How many experts each layer keeps."""

    FILE = "counts.json"

    rule: str
    total: int
    """The experts of all layers together."""
    counts: Mapping[int, int]
    """The number of experts of each layer."""
    importance: Mapping[int, float] | None = None
    """The importance of each layer, if that decided the counts."""
    cost: float | None = None
    """The sum of the measured costs, if those decided the counts."""
    runner_up: Spread | None = None
    """The best spread that differs by moving one step from one layer to another."""
    uniform: Spread | None = None
    """The same number in every layer, if that is legal."""

    def of(self, layer: int) -> int:
        """The number of a layer. A prediction layer, which is not among them, has that of the layer with most."""
        return self.counts.get(layer, max(self.counts.values()))


@dataclass(frozen=True)
class Importance(Record):
    """How much each expert of one layer matters."""

    FILE = "importance.json"

    layer: int
    importance: tuple[float, ...]
    """One number for each expert; 0 or more."""
    tokens: tuple[int, ...]
    """For each expert, the recorded tokens that the router sends to it."""


@dataclass(frozen=True)
class Curves(Record):
    """How much each alternative of each layer, on its own, costs the whole model."""

    FILE = "curves.json"

    tokens: int
    """The number of predictions that were compared."""
    loss: float
    """The loss of the unchanged model, in nats per token."""
    curves: Mapping[int, Mapping[str, float]]
    """By layer and name of the alternative: the KL divergence from the unchanged model, in nats per token."""
    losses: Mapping[int, Mapping[str, float]]
    """The same for the loss, in nats per token."""
    apart: float = 0.0
    """The divergence of the unchanged model itself, if it was compared with another; those of `curves` are from that one then."""
    sequences: Mapping[int, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    """As `curves`, of each sequence by itself, in the same order everywhere: what is noise, and what a difference."""
    apart_of_sequences: tuple[float, ...] = ()
    """As `apart`, of each sequence by itself."""


@dataclass(frozen=True)
class Bits(Record):
    """To how many bits a decision quantizes the experts of each layer; layers that it does not quantize are absent."""

    FILE = "bits.json"

    layers: Mapping[int, int]
    groups: Mapping[int, int] = field(default_factory=dict)
    """By layer, how many weights share a scale, where that is decided, too."""


@dataclass(frozen=True)
class Shortlist(Record):
    """Which alternatives of each layer are worth being measured again."""

    FILE = "shortlist.json"

    layers: Mapping[int, tuple[str, ...]]
    """By layer, the names of the alternatives, the most promising first."""


def left_out(name: str) -> tuple[int, ...]:
    """The experts that an alternative leaves out, by its name among curves: "3", or "3+7" for two together."""
    return tuple(map(int, name.split("+")))


@dataclass(frozen=True)
class Ranks(Record):
    """The rank of every expert's matrices, decided for all layers together."""

    FILE = "ranks.json"
    LEVELS = 3

    rule: str
    """How they were decided: "paper" or "global"."""
    budget: int | None = None
    """The bytes that all experts together may take, if the budget is in bytes."""
    optimal: bool | None = None
    """True if no other ranks within the budget cost less."""
    cost: float | None = None
    """The cost of these ranks, in the unit of the curves that decided them."""
    cost_of_the_same_rank_everywhere: float | None = None
    """The cost of one rank for all matrices within the same budget."""
    ranks: Mapping[int, Mapping[str, Sequence[int]]] = field(kw_only=True)
    """By layer and matrix ("gate", "up", "down"), the rank of each expert; 0: the matrix stays whole. An expert's gate and up are
    both whole or both factored."""


@dataclass(frozen=True)
class TrimmedExperts(Record):
    """Which experts of each layer go, and which stay."""

    FILE = "trim.json"

    trim: Literal["experts"]
    criterion: str
    """The score that ranked the experts."""
    keep: Mapping[int, Sequence[int]]
    """By layer, the experts that stay, ascending; empty if the layer loses all."""
    drop: Mapping[int, Sequence[int]]
    """By layer, the others."""
    scores: Mapping[int, Sequence[float]]
    """By layer, the score of each expert."""


@dataclass(frozen=True)
class TrimmedLayers(Record):
    """Which layers lose their MoE block (Layer Drop), or go as a whole (Block Drop)."""

    FILE = "trim.json"

    trim: Literal["moe_blocks", "decoder_layers"]
    drop: Sequence[int]
    """The layers, ascending, by their old indices."""
    similarity: Mapping[int, float]
    """By layer, the mean cosine between the states before and behind its MoE block, or the `gap` decoder layers starting at it."""
    rule: Literal["discrete", "consecutive"]
    """discrete: each layer by its own similarity; consecutive: adjacent layers by the similarity across all of them."""
    gap: int
    """The number of adjacent decoder layers across which the cosines were taken."""


def _lines(value: Any, depth: int, levels: int) -> str:
    """Indented JSON with each list of numbers, and below so many levels each dictionary of lists, on one line."""
    named, height = isinstance(value, Mapping), _height(value)
    if not value or (height == 2 and depth >= levels if named else height < 2):
        return json.dumps(value)
    names = [f"{json.dumps(str(name))}: " for name in value] if named else [""] * len(value)
    inside = (_lines(v, depth + 1, levels) for v in (value.values() if named else value))
    text = ",\n".join(" " * (depth + 1) + name + line for name, line in zip(names, inside, strict=True))
    begin, end = "{}" if named else "[]"
    return f"{begin}\n{text}\n{' ' * depth}{end}"


def _height(value: Any) -> int:
    """How deeply containers are nested."""
    if not isinstance(value, Mapping | list | tuple):
        return 0
    return 1 + max((_height(v) for v in (value.values() if isinstance(value, Mapping) else value)), default=0)


@dataclass(frozen=True)
class Facts:
    """What was done to one decoder layer: `facts.json` in its folder.

    Every step that rewrites a layer takes the layer's facts along and adds its own. A step that leaves a layer's files as they are
    adds nothing. Facts say what was done; the records of the decisions say why.
    """

    FILE: ClassVar[str] = "facts.json"

    done: tuple[Mapping[str, Any], ...] = ()
    """One entry per step, earliest first: `step`, its name, and what it did. Experts have the indices from before the step."""

    @classmethod
    def of(cls, layer_files: Artifact) -> Self:
        """The facts of a layer; empty if nothing was done to it."""
        return cls(tuple(read_json(layer_files, cls.FILE))) if cls.FILE in layer_files.names() else cls()

    def and_then(self, step: str, **fact: Any) -> Self:
        return replace(self, done=(*self.done, {"step": step, **fact}))

    def write(self, folder: Path) -> None:
        (folder / self.FILE).write_text("[\n" + ",\n".join(map(readable_lines, self.done)) + "\n]\n")


def readable_lines(fact: Mapping[str, Any]) -> str:
    """A JSON object with each field, and each entry of a list of objects, on one line."""
    lines = []
    for name, value in fact.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"   {json.dumps(v)}" for v in value) + "\n  ]"
        lines.append(f"  {json.dumps(name)}: {text}")
    return " {\n" + ",\n".join(lines) + "\n }"


def decision(artifact: Artifact) -> dict[str, Any]:
    """What a step decided, from its one JSON file, without the losses of everything that it compared."""
    (name,) = (n for n in artifact.names() if n.endswith(".json"))
    return {k: v for k, v in read_json(artifact, name).items() if k != "losses"}


def kept_experts(decision: Artifact, layer: int) -> list[int]:
    """The experts of a layer that stay, ascending, from the decision of a search or of a trimming."""
    keep = Choice.read(decision).keep if Choice.FILE in decision.names() else TrimmedExperts.read(decision).keep[layer]
    return list(keep)
