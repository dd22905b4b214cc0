"""Rounding column by column, where the following columns compensate for the error (GPTQ).

Shapes are suffixes: E matrices of a batch, the experts of a layer, M outputs and N inputs of a matrix, G groups of inputs, B
columns of a stripe. Tensors stay on their device. The sweep over the columns is `sparsegpt`'s.
"""

import torch
from torch import Tensor

from moeflow.methods.moments import check_moment, check_weight, matrices
from moeflow.methods.slim.grid import Grid
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.quantized import Quantized
from moeflow.methods.slim.rounding import scales
from moeflow.methods.slim.sparsegpt import Stripe, Treat, chunks, factor, sweep, sweep_memory


@torch.no_grad()
def gptq(w_MN: Tensor, moment_NN: Tensor, how: Slimming, scale_dtype: torch.dtype = torch.float32) -> Quantized:
    """Round the weight [M, N] column by column; later columns compensate for earlier errors (Frantar et al., ICLR 2023).

    `moment_NN` is the sum over tokens of the inputs' outer products, in any unit. `damp` times its mean diagonal is added to the
    diagonal (section 3.3). A group's scales come from the updated weights at the start of the stripe of columns in which the group
    starts, as in the authors' code; with `activation_order` they come from the weights as given, so that a group is still
    consecutive inputs, as kernels expect. Scales are rounded to `scale_dtype`. An input that was never seen is rounded to nearest.
    Memory is that of the result plus `sparsegpt.BUDGET`, or `memory` if that is more. Raises ValueError if groups do not divide the
    columns, or for a bad moment (`check_moment`).
    """
    rows, columns = w_MN.shape[-2:]
    check_weight(w_MN)
    check_moment(moment_NN, (*w_MN.shape[:-2], columns, columns), "moment", "round_to_nearest")
    w_EMN, moment_ENN, grid = matrices(w_MN), matrices(moment_NN), how.grid
    scale_EMG = torch.empty(len(w_EMN), rows, grid.groups(columns), dtype=scale_dtype, device=w_MN.device)
    codes_EMN = torch.empty(w_EMN.shape, dtype=torch.int8, device=w_MN.device)
    made = Quantized(codes_EMN, scale_EMG, None if grid.symmetric else torch.empty_like(scale_EMG, dtype=torch.int8), grid)
    for now in chunks(w_EMN, memory(rows, columns, how)):
        _round_into(made[now], w_EMN[now], moment_ENN[now], how)
    return made.reshaped(*w_MN.shape[:-2])


def memory(rows: int, columns: int, how: Slimming) -> int:
    """Bytes of working memory for one matrix, beside weights, moments and the result: fp32 except for the codes."""
    ordered = how.activation_order
    codes = (6 if ordered else 1) * rows * columns
    levels = 8 * rows * how.grid.groups(columns) * (3 if ordered else 2)
    return sweep_memory(rows, columns, how.columns, how.group) + codes + levels + 16 * how.columns * rows


def _round_into(made: Quantized, w_MN: Tensor, moment_NN: Tensor, how: Slimming) -> None:
    """Round a matrix, or a batch of them, and write codes, scales and zero points into `made`."""
    order_N = None
    if how.activation_order:
        order_N = moment_NN.diagonal(dim1=-2, dim2=-1).clamp(min=0).argsort(-1, descending=True)
    levels = _Levels(w_MN, how.grid, order_N, made.scale_MG.dtype)
    ordered_MN = w_MN if order_N is None else w_MN.take_along_dim(order_N[..., None, :], dim=-1)
    codes_NM = torch.empty(w_MN.mT.shape, dtype=torch.int8, device=w_MN.device)
    for stripe in sweep(ordered_MN, factor(moment_NN, how.damp, order_N), how.columns, levels.ahead):
        levels.enter(stripe)
        code_BM = torch.empty_like(stripe.error_BM)
        stripe.treat(_round(code_BM, *levels.of(stripe), how.grid))
        codes_NM[..., stripe.start : stripe.stop, :] = code_BM
    if order_N is not None:
        codes_NM = codes_NM.take_along_dim(order_N.argsort(-1)[..., None], dim=-2)
    made.codes_MN.copy_(codes_NM.mT)
    made.scale_MG.copy_(levels.scale_GM.mT)
    if made.zero_MG is not None and levels.zero_GM is not None:
        made.zero_MG.copy_(levels.zero_GM.mT)


Rows = tuple[Tensor, ...]


class _Levels:
    """The scales and zero points [G, M] of a matrix that is being rounded, and which of them each column of a stripe uses."""

    def __init__(self, w_MN: Tensor, grid: Grid, order_N: Tensor | None, dtype: torch.dtype) -> None:
        self.grid, self.dtype, self.order_N = grid, dtype, order_N
        *batch, rows, columns = w_MN.shape
        groups = grid.groups(columns)
        self.size = columns // groups
        self.scale_GM = torch.empty(*batch, groups, rows, dtype=torch.float32, device=w_MN.device)
        self.zero_GM = None if grid.symmetric else torch.empty_like(self.scale_GM)
        self.first = groups == 1 or order_N is not None
        if self.first:
            self._set(0, groups, w_MN.mT)

    def ahead(self, start: int, stop: int) -> int:
        """The end of the last group that starts among these columns, if its scale follows the updated weights; otherwise 0."""
        return 0 if self.first else -(-stop // self.size) * self.size if stop > -(-start // self.size) * self.size else 0

    def enter(self, stripe: Stripe) -> None:
        """Compute the scales of the groups that start in this stripe."""
        low, end = -(-stripe.start // self.size), self.ahead(stripe.start, stripe.stop) // self.size
        if end > low:
            self._set(low, end, stripe.weight_SM[..., low * self.size - stripe.start : end * self.size - stripe.start, :])

    def of(self, stripe: Stripe) -> tuple[Rows, Rows]:
        """The scale and the zero point, [M] each, of every column of the stripe; a symmetric grid has no zero points."""
        index = torch.arange(stripe.start, stripe.stop) if self.order_N is None else self.order_N[..., stripe.start : stripe.stop]
        return self._rows(self.scale_GM, index // self.size), self._rows(self.zero_GM, index // self.size)

    def _rows(self, level_GM: Tensor | None, index_B: Tensor) -> Rows:
        if level_GM is None:
            return ()
        if index_B.dim() > 1:  # each matrix has its own order
            return level_GM.take_along_dim(index_B[..., None], dim=-2).unbind(-2)
        rows = level_GM.unbind(-2)
        return tuple(rows[g] for g in index_B.tolist())

    def _set(self, low: int, end: int, weight_XM: Tensor) -> None:
        groups = weight_XM.unflatten(-2, (end - low, self.size))
        scale_GM, zero_GM = scales(groups.amin(-2).float(), groups.amax(-2).float(), self.grid, self.dtype)
        self.scale_GM[..., low:end, :] = scale_GM
        if self.zero_GM is not None and zero_GM is not None:
            self.zero_GM[..., low:end, :] = zero_GM


def _round(code_BM: Tensor, scale_M: Rows, zero_M: Rows, grid: Grid) -> Treat:
    code_M = code_BM.unbind(-2)
    shifted_M = torch.empty_like(code_M[0]) if zero_M else None

    def column(i: int, weight_M: Tensor, error_M: Tensor) -> None:
        code = torch.div(weight_M, scale_M[i], out=code_M[i]).round_()
        if shifted_M is None:
            code.clamp_(grid.lowest, grid.highest)
            torch.addcmul(weight_M, code, scale_M[i], value=-1, out=error_M)
        else:
            code.add_(zero_M[i]).clamp_(grid.lowest, grid.highest)
            torch.addcmul(weight_M, torch.sub(code, zero_M[i], out=shifted_M), scale_M[i], value=-1, out=error_M)

    return column
