"""Masks of the weights that stay, by magnitude or by magnitude times input norm (Wanda), and statistics of the inputs.

Shapes are suffixes: T tokens, E matrices of a batch, the experts of a layer, M outputs and N inputs of a matrix. Tensors stay on
their device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeflow.methods.moments import second_moment
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.pattern import Pattern

Inputs = Tensor | Sequence[Tensor]
"""The inputs [.., T, N] of every matrix of the batch, or one tensor [T, N] for each if their numbers of tokens differ."""


@torch.no_grad()
def magnitude(w_MN: Tensor, pattern: Pattern | str) -> Tensor:
    """A mask [M, N], True where a weight stays: the largest of the matrix or, with N:M, of each group of inputs of a row.

    A ratio drops that part of each matrix, rounded down (Han et al., Learning both Weights and Connections, NeurIPS 2015, section
    3). Among equal weights the first is dropped first. Raises ValueError if the pattern does not divide the columns.
    """
    pattern = _checked(w_MN, pattern)
    keep_EMN = torch.stack([_stays(size_MN, pattern, rows=False) for size_MN in matrices(w_MN).abs()])
    return keep_EMN.reshape(w_MN.shape)


@torch.no_grad()
def wanda(w_MN: Tensor, pattern: Pattern | str, *, moment: Tensor | None = None, inputs: Inputs | None = None) -> Tensor:
    """A mask [M, N], True where a weight stays: the largest of each row by magnitude times input norm.

    Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024, section 3. `moment` is the sum over
    tokens of the inputs' squares, [N], or of their outer products, [N, N], in any unit; or give the inputs. A ratio drops that part
    of each row, rounded down; among equal scores the first is dropped first. Raises ValueError if the pattern does not divide the
    columns, or if statistics do not fit, are not finite, or are zero because an expert saw no tokens.
    """
    pattern = _checked(w_MN, pattern)
    w_EMN, seen = matrices(w_MN), InputStatistics.of(w_MN, moment, inputs, instead="magnitude()", squares=True)
    keep_EMN = torch.stack([_stays(w.float().abs() * seen.squares(e).sqrt().float(), pattern) for e, w in enumerate(w_EMN)])
    return keep_EMN.reshape(w_MN.shape)


def drop_by_magnitude(w_MN: Tensor, moment_NN: Tensor | None, how: Slimming, scale_dtype: torch.dtype) -> Tensor:
    """The function of `magnitude` in the table of methods."""
    return w_MN * magnitude(w_MN, how.pattern)


def drop_by_wanda(w_MN: Tensor, moment_NN: Tensor, how: Slimming, scale_dtype: torch.dtype) -> Tensor:
    """The function of `wanda` in the table of methods."""
    return w_MN * wanda(w_MN, how.pattern, moment=moment_NN)


def lowest(score: Tensor, count: int) -> Tensor:
    """True for exactly the `count` smallest of each row [.., K]; among equal ones the first."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    bound = smallest(score, count)[..., None]
    below, equal = score < bound, score == bound
    left = count - below.sum(-1, keepdim=True)
    if (equal.sum(-1, keepdim=True) == left).all():
        return below | equal
    return below | (equal & (equal.cumsum(-1) <= left))


def smallest(score: Tensor, count: int) -> Tensor:
    """The `count`-th smallest of each row [.., K], from 1. On the CPU numpy's selection is ten times as fast as torch's."""
    if score.device.type == "cpu" and score.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.partition(score.numpy(), count - 1, axis=-1)[..., count - 1 : count]).squeeze(-1)
    return score.kthvalue(count, dim=-1).values


def smallest_of_few(score_mX: Tensor, count: int) -> Tensor:
    """True for exactly the `count` smallest along the second last dimension, which is short; among equal ones the first."""
    rank_mX = torch.zeros(score_mX.shape, dtype=torch.float32, device=score_mX.device)
    score_X, rank_X = score_mX.unbind(-2), rank_mX.unbind(-2)
    before_X = torch.empty_like(rank_X[0])
    for i, score in enumerate(score_X):
        rank_X[i].add_(len(score_X) - 1 - i)
        for j in range(i + 1, len(score_X)):
            torch.le(score, score_X[j], out=before_X)
            rank_X[j].add_(before_X)
            rank_X[i].sub_(before_X)
    return rank_mX < count


def matrices(w_MN: Tensor) -> Tensor:
    """The matrices with all batch dimensions merged into one: [E, M, N]."""
    return w_MN.reshape(-1, *w_MN.shape[-2:])


def check_weight(w_MN: Tensor) -> None:
    """Raise ValueError unless this is a finite floating-point matrix, or a batch of them."""
    if w_MN.dim() < 2 or not w_MN.numel() or not w_MN.is_floating_point():
        raise ValueError(f"the weight is {w_MN.dtype} of shape {tuple(w_MN.shape)}; give floating numbers [.., rows, columns]")
    if bad := [str(e) for e, w in enumerate(matrices(w_MN)) if not torch.stack(torch.aminmax(w)).isfinite().all()]:
        raise ValueError(f"the weight{_which(w_MN, bad)} is not finite; the checkpoint is damaged")


@dataclass(frozen=True)
class InputStatistics:
    """Checked statistics of each matrix's inputs: their second moment [N, N], their summed squares [N], or the inputs [T, N]."""

    each: tuple[Tensor, ...]
    are: str

    @staticmethod
    def of(w_MN: Tensor, moment: Tensor | None, inputs: Inputs | None, *, instead: str, squares: bool = False) -> "InputStatistics":
        """The statistics of the weight's matrices. `instead`: what an error recommends; `squares`: whether [N] will do."""
        if (moment is None) == (inputs is None):
            raise ValueError(f"give either moment or inputs; without tokens there is {instead}")
        *batch, _, columns = w_MN.shape
        if moment is None:
            assert inputs is not None
            found, name = InputStatistics(tuple(_tokens(inputs, batch, columns)), "tokens"), "inputs"
        elif squares and tuple(moment.shape) == (*batch, columns):
            found, name = InputStatistics(tuple(moment.reshape(-1, columns)), "squares"), "moment"
        elif tuple(moment.shape) == (*batch, columns, columns):
            found, name = InputStatistics(tuple(matrices(moment)), "moment"), "moment"
        else:
            also = f" or {(*batch, columns)}" if squares else ""
            raise ValueError(f"moment has shape {tuple(moment.shape)}, the weight asks for {(*batch, columns, columns)}{also}")
        for e, one in enumerate(found.each):
            _check_seen(one, found.are, f"{name}{_which(w_MN, [str(e)])}", instead)
        return found

    def squares(self, e: int) -> Tensor:
        """The summed squares [N] of the inputs of matrix `e`."""
        one = self.each[e]
        if self.are == "tokens":
            return one.float().square().sum(0, dtype=torch.float64)
        return (one.diagonal() if self.are == "moment" else one).clamp(min=0)

    def moment(self, e: int) -> Tensor:
        """The second moment [N, N] of the inputs of matrix `e`."""
        assert self.are != "squares"
        return self.each[e] if self.are == "moment" else second_moment(self.each[e])


def _tokens(inputs: Inputs, batch: list[int], columns: int) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        if inputs.dim() <= len(batch) or list(inputs.shape[: len(batch)]) != batch or inputs.shape[-1] != columns:
            raise ValueError(f"inputs have shape {tuple(inputs.shape)}, the weight asks for {(*batch, 'tokens', columns)}")
        found = list(inputs.reshape(torch.Size(batch).numel(), inputs.shape[len(batch) : -1].numel(), columns))
    else:
        found = [x.reshape(-1, x.shape[-1]) for x in inputs]
    count = torch.Size(batch).numel()
    if len(found) != count or any(x.shape[-1] != columns for x in found):
        shapes = ", ".join(str(tuple(x.shape)) for x in found)
        raise ValueError(f"inputs are of shapes {shapes}; the weight asks for {count} of {('tokens', columns)}")
    return found


def _check_seen(one: Tensor, are: str, name: str, instead: str) -> None:
    total_N = (
        one.abs().sum(0, dtype=torch.float64) if are == "tokens" else one.sum(0, dtype=torch.float64) if are == "moment" else one
    )
    size_N = one.diagonal() if are == "moment" else total_N
    if not (total_N.isfinite().all() and size_N.isfinite().all()):
        raise ValueError(f"{name}: not finite; look for overflow in the activations")
    if (size_N < -1e-6 * size_N.abs().max()).any():  # smaller ones are rounding errors
        raise ValueError(f"{name}: a sum of squares is negative, {float(size_N.min()):g}; compute it again")
    if not size_N.any():
        raise ValueError(
            f"{name}: all zero, so no tokens were seen; calibrate on more text, use {instead} or keep the matrix whole"
        )
    if are == "moment" and ((total_N - one.sum(1, dtype=torch.float64)).abs() > 1e-3 * size_N.max()).any():
        raise ValueError(f"{name}: not symmetric; a second moment is the sum of x x'")


def _checked(w_MN: Tensor, pattern: Pattern | str) -> Pattern:
    check_weight(w_MN)
    pattern = Pattern.parse(pattern)
    pattern.check(w_MN.shape[-1])
    return pattern


def _stays(score_MN: Tensor, pattern: Pattern, rows: bool = True) -> Tensor:
    if pattern.of:
        groups = score_MN.unflatten(-1, (-1, pattern.of))
        return ~smallest_of_few(groups.mT.contiguous(), pattern.of - pattern.keep).mT.flatten(-2)
    shares = score_MN if rows else score_MN.flatten()
    return ~lowest(shares, int(shares.shape[-1] * pattern.ratio)).reshape(score_MN.shape)


def _which(w_MN: Tensor, matrix: list[str]) -> str:
    return "" if w_MN.dim() == 2 else f" of matrix {', '.join(matrix)}"
