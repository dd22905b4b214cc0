"""Whitened decomposition beside what it beats: forming the same whitened matrix and its full singular value decomposition.

fp32, one thread. Eight matrices of 1408×2048 at rank 512 (experts of Qwen1.5-MoE or DeepSeek-V2-Lite), and one of 4096×14336
(the down matrix of an expert of Mixtral-8x7B) at half its break-even rank, with the second moment of its inputs or of its
outputs. Forming means a Cholesky factor L of the inputs' moment and W L. Ours is timed until the factors are there.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.rows import Row
from moeflow.methods.decompose.lowrank import components
from moeflow.methods.decompose.ranks import break_even
from moeflow.model.moe import LowRank

T = TypeVar("T")


def moment(columns: int) -> Tensor:
    """The second moment [N, N] of inputs of which a few hundred directions are up to a thousand times stronger than the rest."""
    strong_NL = torch.randn(columns, 256) * torch.logspace(1.5, 0, 256)
    return strong_NL @ strong_NL.mT / columns + torch.diag(torch.rand(columns) + 0.5)


def whitened(w_MN: Tensor, rank: int, **moment: Any) -> LowRank:
    """The matrix of this rank whose outputs differ least over the moment's tokens."""
    return components(w_MN, rank=rank, **moment).truncated(rank)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    done = work()
    return time.perf_counter() - start, done


def reference(w_MN: Tensor, moment_NN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Cholesky factor, the whitened matrix, and its singular values, all vectors computed."""
    factor_NN = torch.linalg.cholesky(moment_NN)
    white_MN = w_MN @ factor_NN
    return factor_NN, white_MN, torch.linalg.svd(white_MN, full_matrices=False)[1]


def excess(cut: LowRank, rank: int, factor_NN: Tensor, white_MN: Tensor, values_K: Tensor) -> float:
    """How far the error of the outputs is above that of the best matrix of this rank, in per cent."""
    reached = torch.linalg.vector_norm(cut.out_MR @ (cut.in_RN @ factor_NN) - white_MN, dim=(-2, -1), dtype=torch.float64)
    best = values_K[..., rank:].double().square().sum(-1).sqrt()
    return float((reached / best - 1).max()) * 100


def small() -> tuple[float, float]:
    w_BMN, moment_BNN, rank = torch.randn(8, 1408, 2048) * 0.02, torch.stack([moment(2048) for _ in range(8)]), 512
    ours = theirs = float("inf")
    for _ in range(2):
        seconds, cut = timed(lambda: whitened(w_BMN, rank, input_moment_NN=moment_BNN))
        ours = min(ours, seconds)
        seconds, known = timed(lambda: reference(w_BMN, moment_BNN))
        theirs = min(theirs, seconds)
    return theirs / ours, excess(cut, rank, *known)


def large() -> tuple[float, float, float]:
    w_MN, moment_NN = torch.randn(4096, 14336) * 0.02, moment(14336)
    rank = int(break_even(4096, 14336) / 2)
    by_inputs, cut = timed(lambda: whitened(w_MN, rank, input_moment_NN=moment_NN))
    theirs, known = timed(lambda: reference(w_MN, moment_NN))
    worst = excess(cut, rank, *known)
    moment_MM = known[1] @ known[1].mT
    by_outputs, cut = timed(lambda: whitened(w_MN, rank, output_moment_MM=moment_MM))
    return theirs / by_inputs, theirs / by_outputs, max(worst, excess(cut, rank, *known))


@torch.inference_mode()
def main() -> list[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        several, above = small()
        by_inputs, by_outputs, far = large()
    finally:
        torch.set_num_threads(threads)
    claims = [
        ("8 of 1408x2048 at rank 512, inputs' moment given", several, 2),
        ("one of 4096x14336 at rank 1592, inputs' moment given", by_inputs, 3),
        ("one of 4096x14336 at rank 1592, outputs' moment given", by_outputs, 8),
    ]
    rows = [
        Row(f"decompose, {what}, against Cholesky and SVD", value, "at least", target, "times faster")
        for what, value, target in claims
    ]
    return [
        *rows,
        Row("decompose, error of the outputs above the optimum, the largest of all", max(above, far), "at most", 0.1, "%"),
    ]
