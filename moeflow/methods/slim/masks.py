"""Zeros by magnitude, or by magnitude times input norm (Wanda), and the selection of the smallest scores.

Shapes are suffixes: T tokens, E matrices of a batch, the experts of a layer, M outputs and N inputs of a matrix. Tensors stay on
their device.
"""

import numpy as np
import torch
from torch import Tensor

from moeflow.methods.moments import check_moment, check_weight, matrices
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.pattern import Pattern


@torch.no_grad()
def magnitude(w_MN: Tensor, moment_NN: Tensor | None, how: Slimming, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [M, N] with zeros but for the largest of the matrix or, with N:M, of each group of inputs of a row.

    A ratio drops that part of each matrix, rounded down (Han et al., Learning both Weights and Connections, NeurIPS 2015, section
    3). Among equal weights the first is dropped first. Raises ValueError if the pattern does not divide the columns.
    """
    check_weight(w_MN)
    return w_MN * torch.stack([_stays(size_MN, how, rows=False) for size_MN in matrices(w_MN).abs()]).reshape(w_MN.shape)


@torch.no_grad()
def wanda(w_MN: Tensor, moment_NN: Tensor, how: Slimming, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [M, N] with zeros but for the largest of each row by magnitude times input norm.

    Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024, section 3. `moment_NN` is the sum over
    tokens of the inputs' outer products, in any unit. A ratio drops that part of each row, rounded down; among equal scores the
    first is dropped first. Raises ValueError if the pattern does not divide the columns, or for a bad moment (`check_moment`).
    """
    columns = w_MN.shape[-1]
    check_weight(w_MN)
    check_moment(moment_NN, (*w_MN.shape[:-2], columns, columns), "moment", "magnitude")
    norm_EN = matrices(moment_NN).diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().float()
    stays = [_stays(w_MN.float().abs() * norm_N, how) for w_MN, norm_N in zip(matrices(w_MN), norm_EN, strict=True)]
    return w_MN * torch.stack(stays).reshape(w_MN.shape)


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


def _stays(score_MN: Tensor, how: Slimming, rows: bool = True) -> Tensor:
    """True where a weight stays: the highest scores of each row or of the matrix or, with N:M, of each group of inputs."""
    pattern = Pattern.parse(how.pattern)
    pattern.check(score_MN.shape[-1])
    if pattern.of:
        groups = score_MN.unflatten(-1, (-1, pattern.of))
        return ~smallest_of_few(groups.mT.contiguous(), pattern.of - pattern.keep).mT.flatten(-2)
    shares = score_MN if rows else score_MN.flatten()
    return ~lowest(shares, int(shares.shape[-1] * pattern.ratio)).reshape(score_MN.shape)
