"""Pruning column by column, where the following columns compensate for the error (SparseGPT), and the sweep that GPTQ shares.

Shapes are suffixes: M outputs and N inputs of a matrix, B columns of a stripe, S those and some that follow, X any columns, E
matrices at once. The sweep works on transposed weights, so that a column is a contiguous row; tensors stay on their device.

The second moment H of the inputs, plus a little on its diagonal, is R R' with R upper triangular. To compensate for the errors E of
the columns before a stripe b, the sweep adds E R[:, b] inverse(R[b, b]). The papers' implementations also factor inverse(H); here
it is never formed, since its factor is inverse(R) and a stripe needs only inverse(R[b, b]).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moeflow.methods.moments import check_moment, check_weight, matrices
from moeflow.methods.slim.masks import smallest, smallest_of_few
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.pattern import Pattern

INNER = 32
"""How many columns are treated before the rest of their stripe is updated for their errors."""

BUDGET = {"cpu": 0, "cuda": 2 << 30}
"""Bytes of working memory for matrices treated together, by device; one matrix is always treated. On the CPU one by one: each stays
in the cache, and there is no launch to save."""

Treat = Callable[[int, Tensor, Tensor], None]
"""Treats a column [M] of a stripe: takes its index there and its weights, and writes its error into the third argument."""


@torch.no_grad()
def sparsegpt(w_MN: Tensor, moment_NN: Tensor, how: Slimming, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [M, N] with zeros in a pattern, the rest changed to compensate (Frantar & Alistarh, ICML 2023, 3.1-3.4).

    `moment_NN` is the sum over tokens of the inputs' outer products, in any unit. As in the authors' code, a ratio applies to each
    stripe of columns over all rows, and one more weight goes. An input that was never seen costs nothing to prune, so it goes
    first; its remaining weights do not change. Memory is that of the result plus `BUDGET`, or `memory` if that is more. Raises
    ValueError if the pattern does not divide the columns, or for a bad moment (`check_moment`).
    """
    rows, columns = w_MN.shape[-2:]
    check_weight(w_MN)
    check_moment(moment_NN, (*w_MN.shape[:-2], columns, columns), "moment", "magnitude")
    pattern = Pattern.parse(how.pattern)
    pattern.check(columns)
    width = max(how.columns // pattern.of, 1) * pattern.of if pattern.of else how.columns
    w_EMN, moment_ENN = matrices(w_MN), matrices(moment_NN)
    out_EMN = torch.empty_like(w_EMN)
    for now in chunks(w_EMN, memory(rows, columns, how)):
        for stripe in sweep(w_EMN[now], factor(moment_ENN[now], how.damp), width):
            if pattern.of:
                stripe.treat(_drop_in_groups(stripe, pattern), group=pattern.of)
            else:
                stripe.treat(_drop_lowest(stripe, pattern.ratio))
            kept_BM = stripe.weight_SM[..., : stripe.width, :] - stripe.error_BM
            out_EMN[now][..., stripe.start : stripe.stop] = kept_BM.mT.contiguous()
    return out_EMN.reshape(w_MN.shape)


def memory(rows: int, columns: int, how: Slimming) -> int:
    """Bytes of working memory for one matrix, beside weights, moments and the result: fp32 throughout."""
    return sweep_memory(rows, columns, how.columns) + 20 * min(how.columns, columns) * rows


@dataclass(frozen=True)
class Stripe:
    """Columns `start` to `stop`, transposed and updated for the columns before them; `weight_SM` also has some that follow."""

    start: int
    stop: int
    weight_SM: Tensor
    diagonal_B: Tensor
    couple_BB: Tensor
    error_BM: Tensor

    @property
    def width(self) -> int:
        return self.stop - self.start

    def score(self, at: int, to: int) -> Tensor:
        """The cost [X, M] of setting each weight of the columns `at` to `to` to zero, with all else adapted."""
        return (self.weight_SM[..., at:to, :] / self.diagonal_B[..., at:to, None]).square_()

    def treat(self, column: Treat, group: int = 1) -> None:
        """Treat the columns one by one, each updated for the errors of those before it.

        When the first column of a group is treated, all its columns are updated for the errors before the group.
        """
        weight_M, error_M = self.weight_SM.unbind(-2), self.error_BM.unbind(-2)
        inner = max(INNER // group, 1) * group
        for at in range(0, self.width, inner):
            to = min(at + inner, self.width)
            self._make_up(at, to, 0, at)
            for first in range(at, to, group):
                self._make_up(first, first + group, at, first)
                for i in range(first, first + group):
                    self._make_up(i, i + 1, first, i)
                    column(i, weight_M[i], error_M[i])

    def _make_up(self, at: int, to: int, since: int, until: int) -> None:
        if since == until:
            return
        couple_XX = self.couple_BB.narrow(-2, at, to - at).narrow(-1, since, until - since)
        _add_product(self.weight_SM.narrow(-2, at, to - at), couple_XX, self.error_BM.narrow(-2, since, until - since), alpha=-1)


def sweep(w_MN: Tensor, factor_NN: Tensor, width: int, ahead: Callable[[int, int], int] | None = None) -> Iterator[Stripe]:
    """The stripes of one matrix, or of a batch [E, M, N], from left to right. Treat each before asking for the next.

    `ahead(start, stop)` returns the column up to which a stripe needs weights, if that is beyond its own.
    """
    rows, columns = w_MN.shape[-2:]
    left_NM = w_MN.float().mT.contiguous() if w_MN.dtype != torch.float32 else w_MN.mT.clone(memory_format=torch.contiguous_format)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        end = max(stop, ahead(start, stop)) if ahead else stop
        unit_SS = torch.eye(end - start, dtype=left_NM.dtype, device=w_MN.device)
        inverse_SS = torch.linalg.solve_triangular(factor_NN[..., start:end, start:end], unit_SS, upper=True)
        weight_SM = left_NM[..., start:end, :].clone()
        if start:
            _add_product(weight_SM, (factor_NN[..., :start, start:end] @ inverse_SS).mT, left_NM[..., :start, :])
        size = stop - start
        diagonal_B = inverse_SS.diagonal(dim1=-2, dim2=-1)[..., :size]
        couple_BB = (inverse_SS[..., :size, :size] / diagonal_B[..., None]).mT.contiguous()
        stripe = Stripe(start, stop, weight_SM, diagonal_B, couple_BB, weight_SM.new_empty(*weight_SM.shape[:-2], size, rows))
        yield stripe
        # from here on these columns hold their first values minus their final ones
        left_NM[..., start:stop, :] -= weight_SM[..., :size, :]
        left_NM[..., start:stop, :] += stripe.error_BM


def factor(moment_NN: Tensor, damp: float, order_N: Tensor | None = None) -> Tensor:
    """The upper triangular R [N, N], fp32, for which R R' is the damped second moment, its columns in this order if one is given.

    The moment is divided by its mean diagonal over the inputs that were seen. Raises ValueError if it is not positive definite.
    """
    if moment_NN.dim() > 2:
        orders = [None] * len(moment_NN) if order_N is None else order_N
        return torch.stack([factor(one_NN, damp, order) for one_NN, order in zip(moment_NN, orders, strict=True)])
    diagonal_N = moment_NN.diagonal()
    mean = diagonal_N.sum(dtype=torch.float64) / (diagonal_N != 0).sum()
    back_N = None if order_N is None else order_N.flip(0)
    # rows and columns are reversed, so that the lower factor, reversed again, is the upper one
    for dtype in (torch.float32, torch.float64):
        back_NN = moment_NN.flip((0, 1)) if back_N is None else moment_NN[back_N[:, None], back_N]
        back_NN = (back_NN / mean).to(dtype)
        back_NN.diagonal().add_(damp)
        factor_NN, failed = torch.linalg.cholesky_ex(back_NN)
        if not failed:
            return factor_NN.flip((0, 1)).float()
    raise ValueError(f"a moment is not positive semidefinite within damp={damp}; raise damp or compute it again")


def sweep_memory(rows: int, columns: int, width: int, ahead: int = 0) -> int:
    """Bytes that a sweep needs: the weights in fp32, the moment while it is factored, and one stripe with what follows it."""
    span = min(width + ahead, columns)
    return 32 * columns * columns + 4 * rows * columns + 4 * span * (2 * rows + 3 * span + columns) + 12 * span * rows


def chunks(w_EMN: Tensor, bytes_of_one: int) -> list[int] | list[slice]:
    """The matrices to treat at once: single ones, or as many as `BUDGET` allows."""
    at_once, indices = max(1, BUDGET[w_EMN.device.type] // bytes_of_one), range(len(w_EMN))
    return list(indices) if at_once == 1 else [slice(e, e + at_once) for e in indices[::at_once]]


def _drop_lowest(stripe: Stripe, ratio: float) -> Treat:
    score_BM = stripe.score(0, stripe.width)
    flat = score_BM.flatten(-2)
    bound = smallest(flat, int(flat.shape[-1] * ratio) + 1)
    drop_M = score_BM.le_(bound[..., None, None]).unbind(-2)

    def column(i: int, weight_M: Tensor, error_M: Tensor) -> None:
        torch.mul(weight_M, drop_M[i], out=error_M)

    return column


def _drop_in_groups(stripe: Stripe, pattern: Pattern) -> Treat:
    drop_M: list[Tensor] = []

    def column(i: int, weight_M: Tensor, error_M: Tensor) -> None:
        if i % pattern.of == 0:
            dropped = smallest_of_few(stripe.score(i, i + pattern.of), pattern.of - pattern.keep)
            drop_M[:] = dropped.to(weight_M.dtype).unbind(-2)
        torch.mul(weight_M, drop_M[i % pattern.of], out=error_M)

    return column


def _add_product(target_XM: Tensor, a_XX: Tensor, b_XM: Tensor, alpha: float = 1) -> None:
    (target_XM.addmm_ if target_XM.dim() == 2 else target_XM.baddbmm_)(a_XX, b_XM, alpha=alpha)
