"""What steps leave for the next decision: small JSON files that a person can read and diff, each written and read here."""

import json
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


RANKS, DECOMPOSITION = "ranks.json", "decomposition.json"
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


SKIP = "skip.json"

SPARSE = ("magnitude", "wanda", "sparsegpt")
SLIMMED = "slimmed.json"

CURVES = "curves.json"


def read_curves(artifact: Artifact) -> dict[str, Any]:
    """What `measure` wrote: the divergence by layer and alternative under "curves", the loss of each under "losses"."""
    return json.loads(artifact.read(CURVES, 0, artifact.size(CURVES)))


TRIM = "trim.json"


def read_trim(artifact: Artifact) -> dict[str, Any]:
    """What a step of this module decided."""
    return json.loads(artifact.read(TRIM, 0, artifact.size(TRIM)))
