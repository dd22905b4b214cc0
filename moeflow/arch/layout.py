"""How a checkpoint on disk differs from the tensors that moeflow works on. No torch.

moeflow works on one tensor for each matrix of each expert, and on names that begin with `model.layers.`, `model.embed_tokens`,
`model.norm` and `lm_head`, whatever the checkpoint has. A `Layout` says where those are in the checkpoint's files: in stacks of all
experts, under other beginnings of names, inside a multimodal model. The same says how to write a result as its source was.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """A tensor on disk that holds a matrix of every expert, or two below each other: [E, M, N], or [E, M] of biases."""

    name: str  # on disk, over {layer}
    parts: tuple[str, ...]  # the tensors that it holds, over {layer} and {expert}: one, or those of gate and of up
    transposed: bool = False  # it is [E, N, M]
    interleaved: bool = False  # the rows of gate and up take turns, where else all of gate come before all of up


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What differs; with nothing given, nothing does."""

    renamed: tuple[tuple[str, str], ...] = ()  # (on disk, here): beginnings of names; the first that fits counts
    stacked: tuple[Stacked, ...] = ()  # their names are on disk, before any renaming
    beside: tuple[str, ...] = ()  # beginnings of the names of what is no part of the text model: it travels as it is
    inside: tuple[str, ...] = ()  # the keys of config.json that lead to the text model's configuration, outermost first

    def to_json(self) -> dict[str, Any]:
        return {
            "renamed": [list(pair) for pair in self.renamed],
            "stacked": [vars(s) | {"parts": list(s.parts)} for s in self.stacked],
            "beside": list(self.beside),
            "inside": list(self.inside),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Layout":
        return Layout(
            renamed=tuple((a, b) for a, b in value["renamed"]),
            stacked=tuple(Stacked(**(s | {"parts": tuple(s["parts"])})) for s in value["stacked"]),
            beside=tuple(value["beside"]),
            inside=tuple(value["inside"]),
        )
