"""A layer's experts on disk and in memory: matrices or pairs of factors on disk, stacks of them in memory; or multiplied out.

Shapes are suffixes: E experts, M rows, N columns, R rank, D model width, F expert width. This file knows neither files nor
transformers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moeflow.arch import Family
from moeflow.model.buckets import MULTIPLES, Buckets, buckets
from moeflow.model.checkpoint import Tensors
from moeflow.model.formats import Format, routing_shapes
from moeflow.model.moe import MLP, Activation, LowRank

OUT, IN = ".factor_out", ".factor_in"
"""The endings with which `Family.factors` replaces `.weight`."""


@dataclass(frozen=True)
class Form:
    """How a module holds its experts in memory: stacks [E, M, N] for gate, up and down, all rows of gate before those of up.

    Transposed stacks are [E, N, M]; interleaved, the rows of gate and up take turns.
    """

    gated: bool = True
    biased: bool = False
    transposed: bool = False
    interleaved: bool = False

    @property
    def firsts(self) -> int:
        """How many matrices come before down: gate and up, or up alone."""
        return 2 if self.gated else 1


PLAIN = Form()


def shape_of(parameter: Any) -> tuple[int, ...]:
    """The shape of a whole parameter, also if ZeRO-3 has divided it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def form_of(experts: Any) -> Form:
    """The form of a module of fused experts of transformers, or of `RoutedExperts`, by what it says of itself or by its shapes."""
    if isinstance(getattr(experts, "form", None), Form):
        own: Form = experts.form
        return own
    gated = hasattr(experts, "gate_up_proj")
    # only transposed stacks of gate and up are twice as wide as those of down are high
    transposed = gated and shape_of(experts.gate_up_proj)[2] == 2 * shape_of(experts.down_proj)[1]
    return Form(
        gated=gated,
        biased=getattr(experts, "has_bias", False),
        transposed=getattr(experts, "is_transposed", transposed),
        interleaved=gated and not getattr(experts, "is_concatenated", True),
    )


def sizes_of(experts: Any, form: Form) -> tuple[int, int]:
    """The width of the model that these experts see, D, and their own, F."""
    own = shape_of(experts.down_proj)[1:] if "down_proj" in experts._parameters else None
    sides = own or (experts.hidden_dim, experts.intermediate_dim)
    width, inner = reversed(sides) if form.transposed else sides
    return int(width), int(inner)


@dataclass(frozen=True)
class Stack:
    """One parameter of the fused experts: the whole matrices of some experts, or one factor of the others' matrices.

    Whole matrices are [E, M, N], those of one expert below each other. Factors are [R, N] or [R, M], with a row for each rank of
    each expert; `Buckets` says where an expert's lie. A stack of biases is [E, M].
    """

    name: str
    matrices: tuple[str, ...]
    kind: Literal["whole", "in", "out", "bias"]

    def experts(self, format: Format) -> list[int]:
        """The experts in this stack, ascending."""
        if self.kind == "bias":
            return list(range(format.experts))
        return [e for e, rank in enumerate(format.ranks(self.matrices[0])) if (rank == 0) == (self.kind == "whole")]

    def on_disk(self, family: Family, layer: int, matrix: str, expert: int | str) -> str:
        """The name of one piece on disk."""
        at = family.matrices.index(matrix)
        if self.kind == "bias":
            return family.expert_biases(layer, expert)[at]
        name = family.expert(layer, expert)[at]
        return name if self.kind == "whole" else family.factors(name)[self.kind == "in"]

    def piece_shape(self, format: Format, matrix: str, expert: int, width: int, inner: int) -> tuple[int, ...]:
        """The shape of one piece on disk, for a model of width `width` and experts of width `inner`."""
        m, n = (width, inner) if matrix == "down" else (inner, width)
        return self._sides(m, n, format.ranks(matrix)[expert])

    def shape(self, format: Format, width: int, inner: int, form: Form = PLAIN) -> tuple[int, ...]:
        """The shape of the whole stack in memory, padding included."""
        m, n = (width, inner) if self.matrices[0] == "down" else (inner, width)
        if self.factors:
            return self.buckets(format).rows, n if self.kind == "in" else m
        m, *columns = self._sides(m, n, 0)
        return len(self.experts(format)), *self.turned((len(self.matrices) * m, *columns), form)

    def apart(self, format: Format, columns: int) -> tuple[int, ...]:
        """The shape [E, M, N] of factors that all have the largest rank, those of one expert below each other; `columns` is that of
        the parameter."""
        rank = -(-max(map(max, self._ranks(format))) // MULTIPLES[0]) * MULTIPLES[0]
        sides = (rank, columns) if self.kind == "in" else (columns, rank)
        return len(self.experts(format)), len(self.matrices) * sides[0], sides[1]

    def joined(self, apart_EMN: Tensor, format: Format) -> Tensor:
        """Factors of the shape `apart` as they lie in the parameter, zero in its padding. What is beyond their rank is lost."""
        columns = apart_EMN.shape[2] if self.kind == "in" else apart_EMN.shape[1] // len(self.matrices)
        made: list[Tensor] = []
        for bucket in self.buckets(format).every:
            parts = []
            of_bucket = apart_EMN[list(bucket.experts)].chunk(len(self.matrices), dim=1)
            for part_EMN, rank, ranks in zip(of_bucket, bucket.ranks, self._ranks(format), strict=True):
                own_E1 = torch.tensor([[ranks[e]] for e in bucket.experts], device=part_EMN.device)
                open_ER = torch.arange(rank, device=part_EMN.device) < own_E1
                cut_EMN = part_EMN[:, :rank] if self.kind == "in" else part_EMN[:, :, :rank]
                parts.append(cut_EMN * (open_ER[..., None] if self.kind == "in" else open_ER[:, None]))
            made += [torch.cat(parts, dim=1)] if self.kind == "in" else parts
        return torch.cat([part.reshape(-1, columns) for part in made])

    def _ranks(self, format: Format) -> tuple[tuple[int, ...], ...]:
        experts = self.experts(format)
        return tuple(tuple(format.ranks(matrix)[e] for e in experts) for matrix in self.matrices)

    @property
    def factors(self) -> bool:
        return self.kind in ("in", "out")

    def buckets(self, format: Format) -> Buckets:
        """Where the factors of each expert lie."""
        return buckets(self._ranks(format))

    def stacked(self, pieces: Sequence[Sequence[Tensor]], form: Form = PLAIN) -> Tensor:
        """The stack of these pieces: for each of its matrices, one piece per expert."""
        if self.factors:
            side = int(self.kind == "out")
            lie = buckets(tuple(tuple(t.shape[side] for t in part) for part in pieces))
            out = pieces[0][0].new_zeros(lie.rows, pieces[0][0].shape[1 - side])
            slots = self._slots(out, lie)
        else:
            rows, *columns = pieces[0][0].shape
            out = pieces[0][0].new_zeros(len(pieces[0]), *self.turned((len(pieces) * rows, *columns), form))
            slots = [[self.slot(out, at, e, (rows, *columns), form) for e in range(len(out))] for at in range(len(pieces))]
        for part, places in zip(pieces, slots, strict=True):
            for piece_MN, place in zip(part, places, strict=True):
                place[tuple(map(slice, piece_MN.shape))].copy_(piece_MN)
        return out

    def slot(self, stack_EMN: Tensor, at: int, expert: int, shape: Sequence[int], form: Form = PLAIN) -> Tensor:
        """The place in the stack of a piece of this shape: that of its matrix number `at` and its expert number `expert`."""
        all_MN = stack_EMN[expert]
        all_MN = all_MN.mT if form.transposed and all_MN.dim() > 1 else all_MN
        count, rows = len(self.matrices), all_MN.shape[0] // len(self.matrices)
        one_MN = all_MN[at::count] if form.interleaved else all_MN[at * rows : (at + 1) * rows]
        return one_MN[tuple(slice(side) for side in shape)]

    def pieces(self, stack: Tensor, format: Format, form: Form = PLAIN) -> Iterator[tuple[str, int, Tensor]]:
        """The pieces without their padding, as (matrix, expert, tensor [M, N]), which share the stack's memory."""
        if self.factors:
            slots = self._slots(stack, self.buckets(format))
        else:
            m, *n = self.turned(stack.shape[1:], form)
            shape = self._sides(m // len(self.matrices), n[0] if n else 0, 0)
            slots = [[self.slot(stack, at, e, shape, form) for e in range(len(stack))] for at in range(len(self.matrices))]
        for e, expert in enumerate(self.experts(format)):
            for at, matrix in enumerate(self.matrices):
                place, rank = slots[at][e], format.ranks(matrix)[expert]
                yield matrix, expert, place[:rank] if self.kind == "in" else place[:, :rank] if self.kind == "out" else place

    def _slots(self, stack: Tensor, lie: Buckets) -> list[list[Tensor]]:
        """The padded place of each expert's factor, by matrix: [R, N] or [M, R]."""
        if self.kind == "in":
            ranks = {e: b.ranks for b in lie.every for e in b.experts}
            each = [rows.split(ranks[e]) for e, rows in enumerate(lie.first_of(stack))]
        else:
            each = [tuple(t.view(stack.shape[1], -1) for t in parts) for parts in lie.second_of(stack)]
        return [list(of_matrix) for of_matrix in zip(*each, strict=True)]

    @staticmethod
    def turned(sides: Sequence[int], form: Form) -> Sequence[int]:
        """The sides of a stack that has these in the other form, transposed or not."""
        return tuple(reversed(sides)) if form.transposed else tuple(sides)

    def _sides(self, m: int, n: int, rank: int) -> tuple[int, ...]:
        """The shape of one piece of a matrix [M, N]."""
        return {"whole": (m, n), "in": (rank, n), "out": (m, rank), "bias": (m,)}[self.kind]


def all_stacks(*, gated: bool, biased: bool) -> list[Stack]:
    """Every stack that experts with or without a gate and biases can have."""
    first: tuple[str, tuple[str, ...]] = ("gate_up", ("gate", "up")) if gated else ("up", ("up",))
    made = []
    for stem, matrices in (first, ("down", ("down",))):
        made += [Stack(f"{stem}_proj", matrices, "whole"), Stack(f"{stem}_in", matrices, "in")]
        made += [Stack(f"{stem}_out", matrices, "out")]
        made += [Stack(f"{stem}_proj_bias", matrices, "bias")] if biased else []
    return made


STACKS = tuple({s.name: s for gated in (True, False) for s in all_stacks(gated=gated, biased=True)}.values())
"""Every stack that any experts can have; no two have the same name."""


def stacks(format: Format, form: Form = PLAIN) -> list[Stack]:
    """The stacks that a layer of this format has."""
    return [s for s in all_stacks(gated=form.gated, biased=form.biased) if s.experts(format)]


def expert_shapes(family: Family, format: Format, layer: int, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes on disk of a layer's experts, and of the threshold or vectors stored beside them."""
    form = Form(gated=family.gated, biased=bool(family.arch.expert_biases))
    return {
        stack.on_disk(family, layer, matrix, e): stack.piece_shape(format, matrix, e, width, inner)
        for stack in stacks(format, form)
        for matrix in stack.matrices
        for e in stack.experts(format)
    } | routing_shapes(family, format, layer, width, inner)


def fused(
    tensors: Mapping[str, Tensor], family: Family, format: Format, layer: int, experts: nn.Module, **where: object
) -> dict[str, Tensor]:
    """The stacks of a layer's fused experts by name, made of its tensors on disk, which are read one at a time.

    `experts` is the module that they are for, `where` is `device=` and `dtype=`. Raises ValueError if a tensor does not have the
    shape that `piece_shape` says.
    """
    stacked, form = {}, form_of(experts)
    width, inner = sizes_of(experts, form)
    read = tensors.lent if isinstance(tensors, Tensors) else tensors.__getitem__
    for stack in stacks(format, form):
        new = torch.zeros if stack.factors else torch.empty  # of factors there is padding, which stays zero
        stacked[stack.name] = new(stack.shape(format, width, inner, form), **where)  # type: ignore[call-overload]
        for matrix, expert, place_MN in stack.pieces(stacked[stack.name], format, form):
            name = stack.on_disk(family, layer, matrix, expert)
            piece_MN, shape = read(name), stack.piece_shape(format, matrix, expert, width, inner)
            if tuple(piece_MN.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(piece_MN.shape)} where config.json asks for {shape}")
            place_MN.copy_(piece_MN)
    return stacked


def experts_in_memory(experts: nn.Module, act: Activation) -> Iterator[MLP]:
    """The experts of a module of fused experts of transformers, one after the other; they share its memory."""
    form = form_of(experts)
    parameters = dict(experts.named_parameters(recurse=False))
    whole = Format(len(parameters["down_proj"]))
    for e in range(whole.experts):
        pieces: dict[str, list[Tensor]] = {"whole": [], "bias": []}
        for stack in stacks(whole, form):
            sides = stack.turned(parameters[stack.name].shape[1:], form)
            for at in range(len(stack.matrices)):
                shape = (sides[0] // len(stack.matrices), *sides[1:])
                pieces[stack.kind].append(stack.slot(parameters[stack.name], at, e, shape, form))
        *gate, up, down = pieces["whole"]
        yield MLP(gate[0] if gate else None, up, down, act, tuple(pieces["bias"]))


def multiplied_out(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with every pair of factors replaced by their product (made in fp32), under the matrix's name."""
    whole = dict(tensors)
    for name in [n for n in tensors if n.endswith(OUT)]:
        stem = name.removesuffix(OUT)
        whole[stem + ".weight"] = LowRank(whole.pop(name), whole.pop(stem + IN)).whole()
    return whole
