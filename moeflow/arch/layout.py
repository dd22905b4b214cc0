"""How a checkpoint on disk differs from the tensors that moeflow works on. No torch.

moeflow works on one tensor for each matrix of each expert, and on names that begin with `model.layers.`, `model.embed_tokens`,
`model.norm` and `lm_head`, whatever the checkpoint has. A `Layout` says where those are in the checkpoint's files: in stacks of all
experts, under other beginnings of names, inside a multimodal model. The same says how to write a result as its source was.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from moeflow.arch.spec import Arch

BESIDE_A_STACK = ("_blocks", "_scales", "_scale_inv")
"""The endings of what stands for a quantized stack, or beside it: MXFP4 codes, their scales, and the scales of FP8 blocks."""


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """A tensor on disk that holds a matrix of every expert, or two below each other: [E, M, N], or [E, M] of biases."""

    name: str  # on disk, over {layer}
    parts: tuple[str, ...]  # the tensors that it holds, over {layer} and {expert}: one, or those of gate and of up
    transposed: bool = False  # it is [E, N, M]
    interleaved: bool = False  # the rows of gate and up take turns, where else all of gate come before all of up
    layers: tuple[int, ...] | None = None  # the layers that have it, where others have one tensor for each matrix; None: all

    def layer(self, name: str) -> int | None:
        """The decoder layer whose stack is called `name` on disk; None for any other tensor."""
        match = _pattern(self.name, whole=True).match(name)
        return None if match is None else int(match["layer"])

    def names(self, layer: int, expert: int) -> tuple[str, ...]:
        """The tensors of one expert that it holds."""
        return tuple(part.format(layer=layer, expert=expert) for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        said = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        return {k: v for k, v in said.items() if k != "layers" or v is not None}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Stacked":
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return Stacked(**fields)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What differs; with nothing given, nothing does."""

    renamed: tuple[tuple[str, str], ...] = ()
    """(on disk, here): beginnings of names, perhaps over {layer}; the first that fits counts."""
    stacked: tuple[Stacked, ...] = ()  # their names are on disk, before any renaming
    beside: tuple[str, ...] = ()  # beginnings of the names of what is no part of the text model: it travels as it is
    inside: tuple[str, ...] = ()  # the keys of config.json that lead to the text model's configuration, outermost first
    per_expert: bool = False  # transformers also reads one tensor for each matrix of an expert, where this has stacks
    apart: tuple[tuple[str, str], ...] = ()
    """(in the file, on disk): beginnings of the names of multi-token prediction that is kept apart from the decoder layers, and
    under which names it would be the layer behind them, as all else here takes it to be."""

    def numbered(self, name: str) -> str:
        """The name on disk, behind the decoder layers, of a tensor that is called `name` in a file."""
        return rename(name, self.apart)

    def in_file(self, name: str) -> str:
        """The name in a file of a tensor, or of a stack, that is called `name` on disk."""
        return rename(name, [(numbered, file) for file, numbered in self.apart])

    def here(self, name: str) -> str:
        """The name here of a tensor that is called `name` on disk, and is no stack."""
        return rename(name, self.renamed)

    def on_disk(self, name: str) -> str:
        """The name on disk of a tensor that is called `name` here, and is in no stack."""
        return rename(name, [(here, disk) for disk, here in self.renamed])

    def stack(self, name: str) -> tuple[Stacked, int] | None:
        """The stack that is called `name` on disk, with its decoder layer; None if it is no stack."""
        return next(((s, layer) for s in self.stacked if (layer := s.layer(name)) is not None), None)

    def used(self, names: Sequence[str]) -> "Layout":
        """What of it a checkpoint with these tensors has. A quantized stack becomes the stacks that stand for it."""
        candidates = [one for s in self.stacked for one in (s, *(_beside(s, end) for end in BESIDE_A_STACK))]
        stacked = tuple(s for s in candidates if any(s.layer(n) is not None for n in names))
        plain = [n for n in names if not n.startswith(self.beside) and not any(s.layer(n) is not None for s in stacked)]
        renamed = tuple(pair for pair in self.renamed if any(_pattern(pair[0]).match(n) for n in plain))
        return replace(self, renamed=renamed, stacked=stacked)

    def without_wrapper(self) -> "Layout":
        """The same stacks in a checkpoint of the text model alone, under the names here."""
        stacked = tuple(replace(s, name=rename(s.name, self.renamed)) for s in self.stacked)
        return Layout(stacked=stacked, per_expert=self.per_expert, apart=self.plain().apart)

    def plain(self) -> "Layout":
        """The layout of a text model alone that has one tensor for each matrix, under the names here."""
        return Layout(apart=tuple((file, self.here(numbered)) for file, numbered in self.apart))

    def to_json(self) -> dict[str, Any]:
        more = {"apart": [list(pair) for pair in self.apart]} if self.apart else {}
        return {
            "renamed": [list(pair) for pair in self.renamed],
            "stacked": [s.to_json() for s in self.stacked],
            "beside": list(self.beside),
            "inside": list(self.inside),
            "per_expert": self.per_expert,
        } | more

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Layout":
        return Layout(
            renamed=tuple((a, b) for a, b in value["renamed"]),
            stacked=tuple(map(Stacked.from_json, value["stacked"])),
            beside=tuple(value["beside"]),
            inside=tuple(value["inside"]),
            per_expert=bool(value.get("per_expert", False)),
            apart=tuple((a, b) for a, b in value.get("apart", ())),
        )


def layout_in_memory(arch: Arch, names: Iterable[str]) -> Layout:
    """The layout of a checkpoint under the names that transformers has in memory, as `save_original_format=False` writes it.

    It is empty for a checkpoint that has one tensor for each matrix of an expert.
    """
    experts = f"model.layers.{{layer}}.{arch.block}.experts."
    gate, up, down = arch.experts if len(arch.experts) == 3 else ("", *arch.experts)
    stacked = (
        Stacked(name=experts + ("gate_up_proj" if gate else "up_proj"), parts=(gate, up) if gate else (up,)),
        Stacked(name=experts + "down_proj", parts=(down,)),
    )
    if not any(stacked[-1].layer(n) is not None for n in names):
        return Layout()
    renamed = tuple((f"model.layers.{{layer}}.{memory}", f"model.layers.{{layer}}.{disk}") for disk, memory in arch.memory)
    return Layout(renamed=renamed, stacked=stacked, per_expert=True)


def _beside(stack: Stacked, end: str) -> Stacked:
    """The stack that stands for a quantized one, or beside it. Codes and scales of MXFP4 have a row for each output."""
    turned = stack.transposed and end == "_scale_inv"
    return replace(stack, name=stack.name + end, parts=tuple(p + end for p in stack.parts), transposed=turned)


def rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """The name with another beginning, by the first pair (before, after) that fits. A beginning may be over {layer}."""
    for before, after in pairs:
        if match := _pattern(before).match(name):
            beginning = after.replace("{layer}", match["layer"]) if "{layer}" in after else after
            return beginning + name[match.end() :]
    return name


@cache
def _pattern(beginning: str, *, whole: bool = False) -> re.Pattern[str]:
    """What a name begins with, or is, where {layer} is a number."""
    pattern = re.escape(beginning).replace(r"\{layer\}", r"(?P<layer>0|[1-9][0-9]{0,5}|\{layer\})", 1)
    return re.compile(pattern + r"\Z" if whole else pattern)
