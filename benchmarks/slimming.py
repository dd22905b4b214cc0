"""GPTQ and SparseGPT on the experts of one layer beside the loop of the papers' released implementations.

Eight matrices of 4096×1024, fp32, one thread, with the second moments of inputs of which a few hundred directions are much
stronger than the rest; stripes of 128 columns, damp 0.01. The reference takes one matrix after the other, forms and factors the
inverse of its moment, and treats a row-major weight column by column; it ends with what codes stand for, ours with codes and
scales. Best of two rounds in turn, after one of ours that does not count. Both compute the same: what differs is said in the rows.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import Row
from moeflow.methods.slim.gptq import gptq
from moeflow.methods.slim.grid import Grid
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.quantized import Quantized
from moeflow.methods.slim.sparsegpt import sparsegpt

E, M, N = 8, 4096, 1024
COLUMNS, DAMP, ROUNDS = 128, 0.01, 2
GRID = Grid(bits=4, symmetric=True, group=128)


def moment(columns: int) -> Tensor:
    """The second moment [N, N] of inputs of which some hundred directions are up to thirty times stronger than the rest."""
    strong_NL = torch.randn(columns, 256) * torch.logspace(1.5, 0, 256)
    return strong_NL @ strong_NL.mT / columns + torch.diag(torch.rand(columns) + 0.5)


def inverse_factor(moment_NN: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped moment's inverse, the way the papers write it."""
    damped_NN = moment_NN.clone()
    damped_NN.diagonal().add_(DAMP * damped_NN.diagonal().mean())
    inverse_NN = torch.cholesky_inverse(torch.linalg.cholesky(damped_NN))
    return torch.linalg.cholesky(inverse_NN, upper=True)


def by_columns(
    w_MN: Tensor,
    moment_NN: Tensor,
    enter: Callable[[int, Tensor, Tensor], None],
    column: Callable[[int, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """The loop both share: `enter` sees the weights and a stripe's factor as it starts, `column` makes of a column what stays."""
    w_MN, factor_NN = w_MN.clone(), inverse_factor(moment_NN)
    out_MN, losses_MN = torch.zeros_like(w_MN), torch.zeros_like(w_MN)
    for start in range(0, w_MN.shape[1], COLUMNS):
        stop = min(start + COLUMNS, w_MN.shape[1])
        now_MB = w_MN[:, start:stop].clone()
        kept_MB, error_MB, loss_MB = (torch.zeros_like(now_MB) for _ in range(3))
        own_BB = factor_NN[start:stop, start:stop]
        enter(start, w_MN, own_BB)
        for i in range(stop - start):
            w_M, pivot = now_MB[:, i], own_BB[i, i]
            kept_M = column(i, w_M, now_MB, own_BB)
            kept_MB[:, i] = kept_M
            loss_MB[:, i] = (w_M - kept_M) ** 2 / pivot**2
            error_M = (w_M - kept_M) / pivot
            now_MB[:, i:] -= error_M.unsqueeze(1).matmul(own_BB[i, i:].unsqueeze(0))
            error_MB[:, i] = error_M
        out_MN[:, start:stop], losses_MN[:, start:stop] = kept_MB, loss_MB / 2
        w_MN[:, stop:] -= error_MB.matmul(factor_NN[start:stop, stop:])
    return out_MN


def reference_gptq(w_MN: Tensor, moment_NN: Tensor) -> Tensor:
    """Symmetric codes with a scale for every group of columns, found where the group starts; what the codes stand for."""
    scale_M1, left_MN, first = torch.empty(0), w_MN, 0
    size, top = GRID.group, 2**GRID.bits - 1
    zero = (top + 1) / 2

    def enter(start: int, w_MN: Tensor, _: Tensor) -> None:
        nonlocal left_MN, first
        left_MN, first = w_MN, start

    def column(i: int, w_M: Tensor, *_: Tensor) -> Tensor:
        nonlocal scale_M1
        at = first + i
        if at % size == 0:
            scale_M1 = 2 * left_MN[:, at : at + size].abs().amax(1, keepdim=True) / top
        code_M1 = torch.clamp(torch.round(w_M.unsqueeze(1) / scale_M1) + zero, 0, top)
        return (scale_M1 * (code_M1 - zero)).flatten()

    return by_columns(w_MN, moment_NN, enter, column)


def reference_sparsegpt(w_MN: Tensor, moment_NN: Tensor, keep: int = 0, of: int = 0, ratio: float = 0.0) -> Tensor:
    """A ratio of zeros in each stripe, or `keep` of every `of` columns."""
    drop_MB = torch.empty(0)

    def enter(start: int, w_MN: Tensor, own_BB: Tensor) -> None:
        nonlocal drop_MB
        now_MB = w_MN[:, start : start + len(own_BB)]
        drop_MB = torch.zeros_like(now_MB, dtype=torch.bool)
        if not of:
            score_MB = now_MB**2 / own_BB.diagonal().reshape(1, -1) ** 2
            drop_MB = score_MB <= torch.sort(score_MB.flatten())[0][int(score_MB.numel() * ratio)]

    def column(i: int, w_M: Tensor, now_MB: Tensor, own_BB: Tensor) -> Tensor:
        if of and i % of == 0:
            score_Mg = now_MB[:, i : i + of] ** 2 / own_BB.diagonal()[i : i + of].reshape(1, -1) ** 2
            drop_MB.scatter_(1, i + torch.topk(score_Mg, of - keep, dim=1, largest=False)[1], True)
        kept_M = w_M.clone()
        kept_M[drop_MB[:, i]] = 0
        return kept_M

    return by_columns(w_MN, moment_NN, enter, column)


def output_error(w_EMN: Tensor, other_EMN: Tensor, moment_ENN: Tensor) -> float:
    """The root of the summed squared change of the outputs, over all matrices."""
    change_EMN = w_EMN - other_EMN
    return float(((change_EMN @ moment_ENN) * change_EMN).sum(dtype=torch.float64)) ** 0.5


def compared(
    name: str, ours: Callable[[], Tensor | Quantized], theirs: Callable[[], Tensor], w_EMN: Tensor, moment_ENN: Tensor
) -> list[Row]:
    took: list[float] = [float("inf")] * 2
    made: list[Any] = [ours(), None]
    for _ in range(ROUNDS):
        for at, work in enumerate((ours, theirs)):
            start = time.perf_counter()
            made[at] = work()
            took[at] = min(took[at], time.perf_counter() - start)
    mine, known_EMN = made
    if isinstance(mine, Quantized):
        what, mine_EMN = "codes", mine.dequantized()
        apart = (mine_EMN - known_EMN).abs() > mine.scale_MG.repeat_interleave(GRID.group, -1) / 2
    else:
        what, mine_EMN = "zeros", mine
        apart = (mine_EMN == 0) != (known_EMN == 0)
    excess = output_error(w_EMN, mine_EMN, moment_ENN) / output_error(w_EMN, known_EMN, moment_ENN) - 1
    return [
        Row(f"{name}, {E} matrices of {M:,} by {N:,}, against the papers' loop", took[1] / took[0], "at least", 3, "times faster"),
        Row(f"{name}, {what} that differ from it", 100 * float(apart.double().mean()), "at most", 0.1, "%"),
        Row(f"{name}, error of the outputs apart from its", 100 * abs(excess), "at most", 0.1, "%"),
    ]


@torch.inference_mode()
def main(threads: int = 1) -> list[Row]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    w_EMN, moment_ENN = torch.randn(E, M, N) * 0.02, torch.stack([moment(N) for _ in range(E)])

    def each(reference: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.stack([reference(w, s) for w, s in zip(w_EMN, moment_ENN, strict=True)])

    gptq_name, rows = f"GPTQ, {GRID.bits} bits in groups of {GRID.group}", []
    how = partial(Slimming, columns=COLUMNS, damp=DAMP)
    four = how("gptq", bits=GRID.bits, group=GRID.group)
    rows += compared(gptq_name, lambda: gptq(w_EMN, moment_ENN, four), each(reference_gptq), w_EMN, moment_ENN)
    for name, pattern, same in (
        ("SparseGPT, 2:4", "2:4", partial(reference_sparsegpt, keep=2, of=4)),
        ("SparseGPT, half of the weights", "0.5", partial(reference_sparsegpt, ratio=0.5)),
    ):
        ours = partial(sparsegpt, w_EMN, moment_ENN, how("sparsegpt", pattern=pattern))
        rows += compared(name, ours, each(same), w_EMN, moment_ENN)
    torch.set_num_threads(before)
    return rows
