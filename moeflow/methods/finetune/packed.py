"""Train packed experts as they are packed: the scales of their groups, and the codes themselves.

Shapes are suffixes: E experts, M rows and N columns of a matrix, G groups of a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeflow.arch import Family
from moeflow.model.checkpoint import Tensors
from moeflow.model.factors import PLAIN, Stack, form_of, shape_of
from moeflow.model.formats import Format
from moeflow.model.packed import SCALE, Scheme, bits_of, codes_of, repacked

SCALES_PACE = 5.0
"""How many times as fast as LoRA's factors scales are trained: at the rates that suit those, they have hardly moved when a training
ends (LOG.md)."""

CODES_PACE, LONG = 20.0, 512
"""The same of codes, which have to move by a half before anything changes: slower, too few ever do, and much faster so many do at
once that the model gets worse. In more than `LONG` optimizer steps they are trained that much slower: at the same pace twice as
many steps left more (LOG.md)."""


def codes_pace(steps: int) -> float:
    """How many times as fast as LoRA's factors codes are trained in so many optimizer steps."""
    return CODES_PACE * min(1.0, LONG / max(1, steps))


@dataclass(frozen=True)
class Points:
    """The points that the weights of a stack lie on: their codes, the distance between two points at each weight, and the bits.

    Both have the stack's own shape; in its padding both are zero.
    """

    codes: Tensor
    steps: Tensor
    bits: int


class Scaling(nn.Module):
    """Multiplies `weight`, a stack of packed matrices, by one plus a number for each group of a row's weights: their scales change,
    and their codes stay (as in the second phase of EfficientQAT, arXiv 2407.11062, 3.3). The numbers are `SCALES_PACE` times the
    parameter, which starts at zero.

    `shape` is [E, M, N], or [E, N, M] with `axis` 1; `group` how many inputs share a scale (0: all); `joined` as for an `Addition`.
    """

    def __init__(
        self, weight: Tensor, group: int, *, shape: tuple[int, ...], axis: int = 2, joined: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.axis, self.group, self.length, self.joined = axis, group or shape[axis], shape[axis], joined
        sides = [-(-side // self.group) if at == axis else side for at, side in enumerate(shape)]
        self.scales = nn.Parameter(weight.new_zeros(sides))

    def forward(self, w: Tensor) -> Tensor:
        change = (SCALES_PACE * self.scales).repeat_interleave(self.group, dim=self.axis).narrow(self.axis, 0, self.length)
        return torch.addcmul(w, w, change if self.joined is None else self.joined(change))


class Rounding(Scaling):
    """As a `Scaling`, and each code is trained, too: a number that starts at zero says how far it has moved, as if nothing were
    rounded, and the forward pass takes the nearest code (the straight-through estimator, Bengio et al., arXiv 1308.3432, 4).
    """

    def __init__(
        self, weight: Tensor, group: int, points: Points, pace: float,
        *, shape: tuple[int, ...], axis: int = 2, joined: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(weight, group, shape=shape, axis=axis, joined=joined)
        self.bits, self.pace = points.bits, pace
        # parameters, so that ZeRO-3 divides them too
        self.start, self.steps = (nn.Parameter(t.to(weight), requires_grad=False) for t in (points.codes, points.steps))
        self.codes = nn.Parameter(torch.zeros_like(self.start))

    def forward(self, w: Tensor) -> Tensor:
        moved = _moved(self.start, self.pace * self.codes.float(), self.bits)
        rounded = moved + (moved.round() - moved).detach()
        added = self.steps.float() * (rounded - self.start.float())
        return super().forward(w + added.to(w))


def _moved(start: Tensor, by: Tensor, bits: int) -> Tensor:
    """Where codes are that have been moved, fp32, within what these bits can say."""
    return (start.float() + by).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def recoded(parts: Mapping[str, Tensor], by_MN: Tensor) -> Tensor:
    """The codes of a packed matrix in words [M, P], once they are moved; `parts` by the endings of their names."""
    moved_MN = _moved(codes_of(parts), by_MN, bits_of(parts))
    return repacked(moved_MN.round().to(torch.int8), bits_of(parts))


def points_of(
    tensors: Tensors, family: Family, layer: int, stack: Stack, format: Format, scheme: Scheme, experts: nn.Module
) -> Points:
    """The points of one stack of a layer's experts, read from the checkpoint that they were unpacked from."""
    codes, steps = (torch.zeros(shape_of(getattr(experts, stack.name))) for _ in range(2))
    form = PLAIN if format.own else form_of(experts)
    places = zip(stack.pieces(codes, format, form), stack.pieces(steps, format, form), strict=True)
    for (matrix, expert, code_MN), (_, _, step_MN) in places:
        name = stack.on_disk(family, layer, matrix, expert)
        parts = {stored.removeprefix(name): t for stored, t in tensors.packed(name).items()}
        code_MN.copy_(codes_of(parts))
        scale_MG = parts[SCALE].float()
        step_MN.copy_(scale_MG.repeat_interleave(scheme.group or code_MN.shape[1], dim=1))
    return Points(codes, steps, scheme.bits)
