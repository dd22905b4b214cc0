"""Pruning column by column, where the following columns compensate for the error (SparseGPT), and the sweep that GPTQ shares.

Shapes are suffixes: M outputs and N inputs of a matrix, B columns of a block, S those and some that follow, X any columns, E
matrices at once. The sweep works on transposed weights, so that a column is a contiguous row; tensors stay on their device.

The second moment H of the inputs, plus a little on its diagonal, is R R' with R upper triangular. To compensate for the errors E of
the columns before a block b, the sweep adds E R[:, b] inverse(R[b, b]). The papers' implementations also factor inverse(H); here it
is never formed, since its factor is inverse(R) and a block needs only inverse(R[b, b]).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moeflow.methods.slim.masks import Inputs, InputStatistics, check_weight, matrices, smallest, smallest_of_few
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.pattern import Pattern

INNER = 32
"""How many columns are treated before the rest of their block is updated for their errors."""

BUDGET = 2 << 30
"""Bytes of working memory for matrices treated together on a GPU; one matrix is always treated."""

Column = Callable[[int, Tensor, Tensor], None]
"""Treats a column [M] of a block: takes its index there and its weights, and writes its error into the third argument."""


@torch.no_grad()
def sparsegpt(
    w_MN: Tensor,
    pattern: Pattern | str,
    *,
    moment: Tensor | None = None,
    inputs: Inputs | None = None,
    block: int = 128,
    damp: float = 0.01,
    at_once: int | None = None,
) -> Tensor:
    """The weight [M, N] with zeros in this pattern, the rest changed to compensate (Frantar & Alistarh, ICML 2023, 3.1-3.4).

    `moment` is the sum over tokens of the inputs' outer products, [N, N], in any unit; or give the inputs. `damp` times its mean
    diagonal is added to the diagonal. As in the authors' code, a ratio applies to each block of columns over all rows, and one more
    weight goes. An input that was never seen costs nothing to prune, so it goes first; its remaining weights do not change.
    `at_once` matrices of a batch are treated together: by default one on the CPU, elsewhere what BUDGET allows; memory is that of
    the result plus `sparsegpt_memory`. Raises ValueError if the pattern does not divide the columns, or if statistics do not fit,
    are not finite, or are zero because an expert saw no tokens.
    """
    check_weight(w_MN)
    pattern = Pattern.parse(pattern)
    rows, columns = w_MN.shape[-2:]
    pattern.check(columns)
    check_sweep(block, damp)
    w_EMN, seen = matrices(w_MN), InputStatistics.of(w_MN, moment, inputs, instead="magnitude()")
    out_EMN = torch.empty_like(w_EMN)
    if pattern.of:
        block = max(block // pattern.of, 1) * pattern.of
    for now in chunks(w_EMN, at_once, sparsegpt_memory(rows, columns, 1, block=block)):
        for b in sweep(w_EMN[now], factor(seen, now, damp), block):
            if pattern.of:
                b.treat(_drop_in_groups(b, pattern), group=pattern.of)
            else:
                b.treat(_drop_lowest(b, pattern.ratio))
            out_EMN[now][..., b.start : b.stop] = (b.weight_SM[..., : b.width, :] - b.error_BM).mT.contiguous()
    return out_EMN.reshape(w_MN.shape)


def sparsegpt_memory(rows: int, columns: int, at_once: int = 1, *, block: int = 128) -> int:
    """Bytes of working memory for `at_once` matrices, beside weights, moments and the result: fp32 throughout."""
    return sweep_memory(rows, columns, at_once, block) + at_once * 20 * min(block, columns) * rows


def treat(w_MN: Tensor, moment_NN: Tensor, how: Slimming, scale_dtype: torch.dtype) -> Tensor:
    """SparseGPT's function in the table of methods."""
    return sparsegpt(w_MN, how.pattern, moment=moment_NN, block=how.block, damp=how.damp)


def memory(rows: int, columns: int, how: Slimming) -> int:
    return sparsegpt_memory(rows, columns, block=how.block)


@dataclass(frozen=True)
class Block:
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
        """The cost [X, M] of setting each weight of the block's columns `at` to `to` to zero, with all else adapted."""
        return (self.weight_SM[..., at:to, :] / self.diagonal_B[..., at:to, None]).square_()

    def treat(self, column: Column, group: int = 1) -> None:
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


def sweep(w_MN: Tensor, factor_NN: Tensor, block: int, ahead: Callable[[int, int], int] | None = None) -> Iterator[Block]:
    """The blocks of one matrix, or of a batch [E, M, N], from left to right. Treat each before asking for the next.

    `ahead(start, stop)` returns the column up to which a block needs weights, if that is beyond its own.
    """
    rows, columns = w_MN.shape[-2:]
    left_NM = w_MN.float().mT.contiguous() if w_MN.dtype != torch.float32 else w_MN.mT.clone(memory_format=torch.contiguous_format)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        end = max(stop, ahead(start, stop)) if ahead else stop
        unit_SS = torch.eye(end - start, dtype=left_NM.dtype, device=w_MN.device)
        inverse_SS = torch.linalg.solve_triangular(factor_NN[..., start:end, start:end], unit_SS, upper=True)
        weight_SM = left_NM[..., start:end, :].clone()
        if start:
            _add_product(weight_SM, (factor_NN[..., :start, start:end] @ inverse_SS).mT, left_NM[..., :start, :])
        size = stop - start
        diagonal_B = inverse_SS.diagonal(dim1=-2, dim2=-1)[..., :size]
        couple_BB = (inverse_SS[..., :size, :size] / diagonal_B[..., None]).mT.contiguous()
        made = Block(start, stop, weight_SM, diagonal_B, couple_BB, weight_SM.new_empty(*weight_SM.shape[:-2], size, rows))
        yield made
        # from here on these columns hold their first values minus their final ones
        left_NM[..., start:stop, :] -= weight_SM[..., :size, :]
        left_NM[..., start:stop, :] += made.error_BM


def factor(seen: InputStatistics, now: int | slice, damp: float, order_N: Tensor | None = None) -> Tensor:
    """The upper triangular R [N, N], fp32, for which R R' is the damped second moment, its columns in this order if one is given.

    The moment is divided by its mean diagonal over the inputs that were seen. Raises ValueError if it is not positive definite.
    """
    each = range(len(seen.each))[now]
    if isinstance(each, range):
        orders = [None] * len(each) if order_N is None else list(order_N)
        return torch.stack([_factor(seen, e, damp, order) for e, order in zip(each, orders, strict=True)])
    return _factor(seen, each, damp, order_N)


def _factor(seen: InputStatistics, e: int, damp: float, order_N: Tensor | None) -> Tensor:
    moment_NN = seen.moment(e)
    diagonal_N = moment_NN.diagonal()
    mean = diagonal_N.sum(dtype=torch.float64) / (diagonal_N != 0).sum()
    back_N = torch.arange(len(moment_NN) - 1, -1, -1, device=moment_NN.device) if order_N is None else order_N.flip(0)
    # rows and columns are reversed, so that the lower factor, reversed again, is the upper one
    for dtype in (torch.float32, torch.float64):
        back_NN = moment_NN[back_N[:, None], back_N] if order_N is not None else moment_NN.flip((0, 1))
        back_NN = (back_NN / mean).to(dtype)
        back_NN.diagonal().add_(damp)
        factor_NN, failed = torch.linalg.cholesky_ex(back_NN)
        if not failed:
            return factor_NN.flip((0, 1)).float()
    raise ValueError(f"moment of matrix {e} is not positive semidefinite within damp={damp}; raise damp or compute it again")


def sweep_memory(rows: int, columns: int, at_once: int, block: int, ahead: int = 0) -> int:
    """Bytes that a sweep needs: the weights in fp32, the moment while it is factored, and one block with what follows it."""
    span = min(block + ahead, columns)
    moment = 24 * columns * columns
    working = 4 * rows * columns + 4 * span * (2 * rows + 3 * span + columns) + 12 * span * rows
    return moment + at_once * (working + 8 * columns * columns)


def chunks(w_EMN: Tensor, at_once: int | None, bytes_of_one: int) -> Iterator[int | slice]:
    """The matrices to treat at once: one by one on the CPU, where each stays in the cache and there is no launch to save."""
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once={at_once} must be at least 1 matrix")
    if at_once is None:
        at_once = 1 if w_EMN.device.type == "cpu" else max(1, BUDGET // bytes_of_one)
    if at_once == 1:
        yield from range(len(w_EMN))
    else:
        yield from (slice(e, e + at_once) for e in range(0, len(w_EMN), at_once))


def check_sweep(block: int, damp: float) -> None:
    """Raise ValueError if no sweep is possible with these values."""
    if block < 1:
        raise ValueError(f"block={block} must be at least 1 column; 128 is usual")
    if not 0 < damp < float("inf"):
        raise ValueError(f"damp={damp} must be above 0, or inputs never seen leave the moment singular; 0.01 is usual")


def _drop_lowest(b: Block, ratio: float) -> Column:
    score_BM = b.score(0, b.width)
    flat = score_BM.flatten(-2)
    bound = smallest(flat, int(flat.shape[-1] * ratio) + 1)
    drop_M = score_BM.le_(bound[..., None, None]).unbind(-2)

    def column(i: int, weight_M: Tensor, error_M: Tensor) -> None:
        torch.mul(weight_M, drop_M[i], out=error_M)

    return column


def _drop_in_groups(b: Block, pattern: Pattern) -> Column:
    drop_M: list[Tensor] = []

    def column(i: int, weight_M: Tensor, error_M: Tensor) -> None:
        if i % pattern.of == 0:
            dropped = smallest_of_few(b.score(i, i + pattern.of), pattern.of - pattern.keep)
            drop_M[:] = dropped.to(weight_M.dtype).unbind(-2)
        torch.mul(weight_M, drop_M[i % pattern.of], out=error_M)

    return column


def _add_product(target_XM: Tensor, a_XX: Tensor, b_XM: Tensor, alpha: float = 1) -> None:
    (target_XM.addmm_ if target_XM.dim() == 2 else target_XM.baddbmm_)(a_XX, b_XM, alpha=alpha)
