"""What steps leave for the next decision: small JSON files that a person can read and diff, each written and read here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from moeflow.step import Artifact, Context

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


def readable(choice: dict[str, Any]) -> str:
    """Indented JSON with each list of experts in one line."""
    lines = []
    for name, value in choice.items():
        if isinstance(value, dict):
            inside = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f" {json.dumps(name)}: {{\n{inside}\n }}")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


DECOMPOSITION = "decomposition.json"
RANKS = "ranks.json"


@dataclass(frozen=True)
class Ranks:
    """The rank of every expert's matrices, decided for all layers together: `ranks.json`."""

    rule: str
    """How they were decided: "paper" or "global"."""
    ranks: Mapping[int, Mapping[str, Sequence[int]]]
    """Per layer and matrix ("gate", "up", "down") the rank of each expert; 0: the matrix stays whole. Gate and up of an expert are
    both whole or both factored."""
    budget: int | None = None
    """The bytes that all experts together may take, where the rule goes by bytes."""
    optimal: bool | None = None
    """Whether no other ranks within the budget cost less."""
    cost: float | None = None
    """What these ranks cost, in the unit of the curves that they were chosen by."""
    cost_of_the_same_rank_everywhere: float | None = None
    """What one rank for all matrices would cost within the same budget."""

    def write(self, context: Context) -> None:
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "ranks"}
        head = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in facts.items() if v is not None)
        layers = ",\n".join(
            f'  "{layer}": {{\n' + ",\n".join(f"   {json.dumps(m)}: {json.dumps(r)}" for m, r in by.items()) + "\n  }"
            for layer, by in self.ranks.items()
        )
        (context.out / RANKS).write_text("{\n" + head + ' "ranks": {\n' + layers + "\n }\n}\n")

    @classmethod
    def read(cls, artifact: Artifact) -> "Ranks":
        stored = json.loads(artifact.read(RANKS, 0, artifact.size(RANKS)))
        return cls(**stored | {"ranks": {int(layer): by for layer, by in stored["ranks"].items()}})


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


SKIP = "skip.json"

SLIMMED = "slimmed.json"

CURVES = "curves.json"


def read_curves(artifact: Artifact) -> dict[str, Any]:
    """What `measure` wrote: the divergence by layer and alternative under "curves", the loss of each under "losses"."""
    return json.loads(artifact.read(CURVES, 0, artifact.size(CURVES)))


TRIM = "trim.json"


def read_trim(artifact: Artifact) -> dict[str, Any]:
    """What a step of this module decided."""
    return json.loads(artifact.read(TRIM, 0, artifact.size(TRIM)))
