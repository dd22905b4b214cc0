"""A layer's experts on disk and in memory: matrices or pairs of factors on disk, padded stacks in memory; or multiplied out.

Shapes are suffixes: E experts, M rows, N columns, R rank, D model width, F expert width. This file knows neither files nor
transformers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moeflow.arch import MATRICES, Family
from moeflow.model.formats import Format, routing_shapes
from moeflow.model.moe import LowRank

OUT, IN = ".factor_out", ".factor_in"
"""The endings with which `Family.factors` replaces `.weight`."""

RANK_MULTIPLE = 16
"""In memory ranks are padded to a multiple of this, which tensor cores and vector units need or run faster with."""


@dataclass(frozen=True)
class Stack:
    """One parameter of the fused experts, [E, M, N]: the whole matrices of some experts, or one factor of the others' matrices.

    The pieces of one expert lie below each other, each padded with zeros to the rows and columns of the largest.
    """

    name: str
    matrices: tuple[str, ...]
    kind: Literal["whole", "in", "out"]

    def experts(self, format: Format) -> list[int]:
        """The experts in this stack, ascending."""
        return [e for e, rank in enumerate(format.ranks(self.matrices[0])) if (rank == 0) == (self.kind == "whole")]

    def on_disk(self, family: Family, layer: int, matrix: str, expert: int | str) -> str:
        """The name of one piece on disk."""
        name = family.expert(layer, expert)[MATRICES.index(matrix)]
        return name if self.kind == "whole" else family.factors(name)[self.kind == "in"]

    def piece_shape(self, format: Format, matrix: str, expert: int, width: int, inner: int) -> tuple[int, int]:
        """The shape of one piece on disk, for a model of width `width` and experts of width `inner`."""
        m, n = (width, inner) if matrix == "down" else (inner, width)
        return self._sides(m, n, format.ranks(matrix)[expert])

    def shape(self, format: Format, width: int, inner: int) -> tuple[int, int, int]:
        """The shape of the whole stack in memory, padding included."""
        m, n = (width, inner) if self.matrices[0] == "down" else (inner, width)
        rank = padded(max((r for x in self.matrices for r in format.ranks(x)), default=0))
        m, n = self._sides(m, n, rank)
        return len(self.experts(format)), len(self.matrices) * m, n

    def stacked(self, pieces: Sequence[Sequence[Tensor]]) -> Tensor:
        """The stack of these pieces: for each of its matrices, one piece per expert."""
        rows, columns = (max(t.shape[d] for part in pieces for t in part) for d in (0, 1))
        rows, columns = self._sides(rows, columns, padded(rows if self.kind == "in" else columns))
        out_EMN = pieces[0][0].new_zeros(len(pieces[0]), len(pieces) * rows, columns)
        for at, part in enumerate(pieces):
            for e, piece_MN in enumerate(part):
                self.slot(out_EMN, at, e, piece_MN.shape).copy_(piece_MN)
        return out_EMN

    def slot(self, stack_EMN: Tensor, at: int, expert: int, shape: Sequence[int]) -> Tensor:
        """The place in the stack of a piece of this shape: that of its matrix number `at` and its expert number `expert`."""
        start = at * (stack_EMN.shape[1] // len(self.matrices))
        return stack_EMN[expert, start : start + shape[0], : shape[1]]

    def pieces(self, stack_EMN: Tensor, format: Format) -> Iterator[tuple[str, int, Tensor]]:
        """The pieces without their padding, as (matrix, expert, tensor [M, N])."""
        _, m, n = stack_EMN.shape
        for e, expert in enumerate(self.experts(format)):
            for at, matrix in enumerate(self.matrices):
                shape = self._sides(m // len(self.matrices), n, format.ranks(matrix)[expert])
                yield matrix, expert, self.slot(stack_EMN, at, e, shape)

    def _sides(self, m: int, n: int, rank: int) -> tuple[int, int]:
        """The shape of one piece of a matrix [M, N]."""
        return {"whole": (m, n), "in": (rank, n), "out": (m, rank)}[self.kind]


STACKS = (
    Stack("gate_up_proj", ("gate", "up"), "whole"),
    Stack("gate_up_in", ("gate", "up"), "in"),
    Stack("gate_up_out", ("gate", "up"), "out"),
    Stack("down_proj", ("down",), "whole"),
    Stack("down_in", ("down",), "in"),
    Stack("down_out", ("down",), "out"),
)


def stacks(format: Format) -> list[Stack]:
    """The stacks that a layer of this format has."""
    return [s for s in STACKS if s.experts(format)]


def padded(rank: int) -> int:
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def expert_shapes(family: Family, format: Format, layer: int, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes on disk of a layer's experts, and of the threshold or vectors stored beside them."""
    return {
        stack.on_disk(family, layer, matrix, e): stack.piece_shape(format, matrix, e, width, inner)
        for stack in stacks(format)
        for matrix in stack.matrices
        for e in stack.experts(format)
    } | routing_shapes(family, format, layer, width, inner)


def fused(
    tensors: Mapping[str, Tensor], family: Family, format: Format, layer: int, width: int, inner: int, **where: object
) -> dict[str, Tensor]:
    """The stacks of a layer's fused experts by name, made of its tensors on disk, which are read one at a time.

    `where` is `device=` and `dtype=`. Raises ValueError if a tensor does not have the shape that `piece_shape` says.
    """
    stacked = {}
    for stack in stacks(format):
        out_EMN = torch.zeros(stack.shape(format, width, inner), **where)  # type: ignore[call-overload]
        for at, matrix in enumerate(stack.matrices):
            for e, expert in enumerate(stack.experts(format)):
                name = stack.on_disk(family, layer, matrix, expert)
                piece_MN, shape = tensors[name], stack.piece_shape(format, matrix, expert, width, inner)
                if tuple(piece_MN.shape) != shape:
                    raise ValueError(f"{name} has shape {tuple(piece_MN.shape)} where config.json asks for {shape}")
                stack.slot(out_EMN, at, e, shape).copy_(piece_MN)
        stacked[stack.name] = out_EMN
    return stacked


def multiplied_out(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with every pair of factors replaced by their product (made in fp32), under the matrix's name."""
    whole = dict(tensors)
    for name in [n for n in tensors if n.endswith(OUT)]:
        stem = name.removesuffix(OUT)
        whole[stem + ".weight"] = LowRank(whole.pop(name), whole.pop(stem + IN)).whole()
    return whole
