"""What steps leave for the next decision: small JSON files that a person can read and diff, each written and read here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from moeflow.step import Artifact, Context


def read_json(artifact: Artifact, name: str) -> Any:
    return json.loads(artifact.read(name, 0, artifact.size(name)))


CANDIDATES, COUNTS = "candidates.json", "counts.json"


def read_candidates(artifact: Artifact) -> dict[str, Any]:
    """What `candidates` wrote."""
    return json.loads(artifact.read(CANDIDATES, 0, artifact.size(CANDIDATES)))


def read_counts(artifact: Artifact) -> dict[str, Any]:
    """How many experts each layer keeps, as a step of `moeflow.methods.prune.counts` wrote it."""
    return json.loads(artifact.read(COUNTS, 0, artifact.size(COUNTS)))


CHOICE = "choice.json"
CRITERIA = ("random", "frequency", "router_score", "reap", "aimer")
"""What `moeflow.methods.scores` scores single experts by."""


def read_choice(artifact: Artifact) -> dict[str, Any]:
    """What `choose` wrote."""
    return json.loads(artifact.read(CHOICE, 0, artifact.size(CHOICE)))


def readable(choice: Mapping[str, Any]) -> str:
    """Indented JSON with each list of experts in one line."""
    lines = []
    for name, value in choice.items():
        if isinstance(value, Mapping):
            inside = ",\n".join(f"  {json.dumps(str(k))}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f" {json.dumps(name)}: {{\n{inside}\n }}")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


RANKS = "ranks.json"
DECOMPOSED = "decomposed"
"""What a layer's spec says of it where a run decides the ranks."""


def read_ranks(artifact: Artifact) -> dict[str, Any]:
    """What a step that decides ranks wrote: per layer and matrix, the rank of each expert, 0 where it stays whole."""
    return json.loads(artifact.read(RANKS, 0, artifact.size(RANKS)))["ranks"]


IMPORTANCE = "importance.json"


def write_importance(context: Context, layer: int, importance: list[float], tokens: list[int]) -> None:
    """Leave one layer's importances, expert by expert, and how many recorded tokens each of them got."""
    value = {"layer": layer, "importance": importance, "tokens": tokens}
    (context.out / IMPORTANCE).write_text(
        "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}\n"
    )


def read_importance(artifact: Artifact) -> dict[str, Any]:
    """What one layer's importance step wrote."""
    return json.loads(artifact.read(IMPORTANCE, 0, artifact.size(IMPORTANCE)))


SPARSE = ("magnitude", "wanda", "sparsegpt")

CURVES = "curves.json"


def read_curves(artifact: Artifact) -> dict[str, Any]:
    """What `measure` wrote: the divergence by layer and alternative under "curves", the loss of each under "losses"."""
    return json.loads(artifact.read(CURVES, 0, artifact.size(CURVES)))


@dataclass(frozen=True)
class Facts:
    """What was done to one decoder layer: `facts.json` in its folder.

    Every step that rewrites a layer takes the layer's facts along and adds its own. A step that leaves a layer's files as they are
    adds nothing. Facts say what became of the layer; why it was chosen stands in the records of the decisions.
    """

    FILE: ClassVar[str] = "facts.json"

    done: tuple[Mapping[str, Any], ...] = ()
    """One entry for each step, the earliest first: `step`, the step's name, and what it did. Experts have the numbers that they had
    when the step began."""

    @classmethod
    def of(cls, layer_files: Artifact) -> Self:
        """The facts of a layer; none where nothing was done to it."""
        return cls(tuple(read_json(layer_files, cls.FILE))) if cls.FILE in layer_files.names() else cls()

    def and_then(self, step: str, **fact: Any) -> Self:
        return replace(self, done=(*self.done, {"step": step, **fact}))

    def write(self, folder: Path) -> None:
        (folder / self.FILE).write_text("[\n" + ",\n".join(map(readable_lines, self.done)) + "\n]\n")


def readable_lines(fact: Mapping[str, Any]) -> str:
    """A JSON object with each of its fields, and each entry of a list of objects, in one line."""
    lines = []
    for name, value in fact.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"   {json.dumps(v)}" for v in value) + "\n  ]"
        lines.append(f"  {json.dumps(name)}: {text}")
    return " {\n" + ",\n".join(lines) + "\n }"


def decision(artifact: Artifact) -> dict[str, Any]:
    """What a step decided, as its one JSON file says it, without the losses of everything that it weighed."""
    (name,) = (n for n in artifact.names() if n.endswith(".json"))
    return {k: v for k, v in read_json(artifact, name).items() if k != "losses"}


@dataclass(frozen=True)
class TrimmedExperts:
    """Which experts of each layer go, and which stay: `trim.json` of an Expert Drop."""

    FILE: ClassVar[str] = "trim.json"

    criterion: str
    """The score by which the experts were ranked."""
    keep: Mapping[int, Sequence[int]]
    """By layer, the experts that stay, ascending; none where the layer loses them all."""
    scores: Mapping[int, Sequence[float]]
    """By layer, the score of each expert."""

    @classmethod
    def read(cls, artifact: Artifact) -> Self:
        value = read_json(artifact, cls.FILE)
        return cls(value["criterion"], _by_layer(value["keep"]), _by_layer(value["scores"]))

    def write(self, folder: Path) -> None:
        gone = {i: [e for e in range(len(self.scores[i])) if e not in keep] for i, keep in self.keep.items()}
        scores = {i: [round(v, 8) for v in values] for i, values in self.scores.items()}
        text = readable({"trim": "experts", "criterion": self.criterion, "keep": self.keep, "drop": gone, "scores": scores})
        (folder / self.FILE).write_text(text)


@dataclass(frozen=True)
class TrimmedLayers:
    """Which layers lose their MoE block (Layer Drop), or go as a whole (Block Drop): `trim.json`."""

    FILE: ClassVar[str] = "trim.json"

    trim: Literal["moe_blocks", "decoder_layers"]
    drop: Sequence[int]
    """The layers, ascending, by the numbers that they had before."""
    similarity: Mapping[int, float]
    """By layer, the mean cosine between the states before and behind its MoE block, or the `gap` decoder layers from it on."""
    rule: Literal["discrete", "consecutive"] = "discrete"
    """Each layer by its own similarity, or adjacent layers by that across all of them."""
    gap: int = 1
    """The number of adjacent decoder layers across which the cosines were taken."""

    @classmethod
    def read(cls, artifact: Artifact) -> Self:
        value = read_json(artifact, cls.FILE)
        return cls(**value | {"similarity": _by_layer(value["similarity"])})

    def write(self, folder: Path) -> None:
        (folder / self.FILE).write_text(readable(vars(self)))


def kept_experts(decision: Artifact, layer: int) -> list[int]:
    """The experts of a layer that stay, ascending, by the decision of a search or of a trimming."""
    return read_choice(decision)["keep"] if CHOICE in decision.names() else list(TrimmedExperts.read(decision).keep[layer])


def _by_layer(value: Mapping[str, Any]) -> dict[int, Any]:
    return {int(layer): of_layer for layer, of_layer in value.items()}
