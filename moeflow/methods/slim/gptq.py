"""Rounding column by column, where the following columns compensate for the error (GPTQ).

Shapes are suffixes: E matrices of a batch, the experts of a layer, M outputs and N inputs of a matrix, G groups of inputs, B
columns of a block. Tensors stay on their device. The sweep over the columns is `sparsegpt`'s.
"""

import torch
from torch import Tensor

from moeflow.methods.slim.grid import Grid
from moeflow.methods.slim.masks import Inputs, InputStatistics, check_weight, matrices
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.quantized import Quantized
from moeflow.methods.slim.rounding import scales
from moeflow.methods.slim.sparsegpt import Block, Column, check_sweep, chunks, factor, sweep, sweep_memory


@torch.no_grad()
def gptq(
    w_MN: Tensor,
    grid: Grid,
    *,
    moment: Tensor | None = None,
    inputs: Inputs | None = None,
    order: bool = False,
    block: int = 128,
    damp: float = 0.01,
    scale_dtype: torch.dtype = torch.float32,
    at_once: int | None = None,
) -> Quantized:
    """Round the weight [M, N] column by column; later columns compensate for earlier errors (Frantar et al., ICLR 2023).

    `moment` is the sum over tokens of the inputs' outer products, [N, N], in any unit; or give the inputs. `damp` times its mean
    diagonal is added to the diagonal (section 3.3). `order` rounds the inputs with the most energy first. A group's scales come
    from the updated weights at the start of the block in which the group starts, as in the authors' code; with `order` they come
    from the weights as given, so that a group is still consecutive inputs, as kernels expect. Scales are rounded to `scale_dtype`.
    An input that was never seen is rounded to nearest. `at_once` matrices of a batch are treated together: by default one on the
    CPU, elsewhere what BUDGET allows; memory is that of the result plus `gptq_memory`. Raises ValueError if groups do not divide
    the columns, or if statistics do not fit, are not finite, or are zero because an expert saw no tokens.
    """
    check_weight(w_MN)
    rows, columns = w_MN.shape[-2:]
    groups = grid.groups(columns)
    check_sweep(block, damp)
    w_EMN, seen = matrices(w_MN), InputStatistics.of(w_MN, moment, inputs, instead="round_to_nearest()")
    codes_EMN = torch.empty(w_EMN.shape, dtype=torch.int8, device=w_MN.device)
    scale_EMG = torch.empty(len(w_EMN), rows, groups, dtype=scale_dtype, device=w_MN.device)
    zero_EMG = None if grid.symmetric else torch.empty(scale_EMG.shape, dtype=torch.int8, device=w_MN.device)
    for now in chunks(w_EMN, at_once, gptq_memory(rows, columns, 1, grid=grid, order=order, block=block)):
        order_N = _by_energy(seen, now) if order else None
        codes_NM, levels = _rounded(w_EMN[now], seen, now, grid, order_N, block, damp, scale_dtype)
        codes_EMN[now] = codes_NM.mT
        scale_EMG[now] = levels.scale_GM.mT.to(scale_dtype)
        if zero_EMG is not None and levels.zero_GM is not None:
            zero_EMG[now] = levels.zero_GM.mT.to(torch.int8)
    return Quantized(codes_EMN, scale_EMG, zero_EMG, grid).reshaped(*w_MN.shape[:-2])


def gptq_memory(rows: int, columns: int, at_once: int = 1, *, grid: Grid, order: bool = False, block: int = 128) -> int:
    """Bytes of working memory for `at_once` matrices, beside weights, moments and the result: fp32 except for the codes."""
    codes = (2 if order else 1) * rows * columns + (4 * rows * columns if order else 0)
    levels = 8 * rows * grid.groups(columns) * (3 if order else 2)
    return sweep_memory(rows, columns, at_once, block, grid.group) + at_once * (codes + levels + 16 * block * rows)


def treat(w_MN: Tensor, moment_NN: Tensor, how: Slimming, scale_dtype: torch.dtype) -> Quantized:
    """GPTQ's function in the table of methods."""
    return gptq(
        w_MN, how.grid, moment=moment_NN, order=how.activation_order, block=how.block, damp=how.damp, scale_dtype=scale_dtype
    )


def memory(rows: int, columns: int, how: Slimming) -> int:
    return gptq_memory(rows, columns, grid=how.grid, order=how.activation_order, block=how.block)


Rows = tuple[Tensor, ...]


class _Levels:
    """The scales and zero points [G, M] of a matrix that is being rounded, and which of them each column of a block uses."""

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

    def enter(self, b: Block) -> None:
        """Compute the scales of the groups that start in this block."""
        low, end = -(-b.start // self.size), self.ahead(b.start, b.stop) // self.size
        if end > low:
            self._set(low, end, b.weight_SM[..., low * self.size - b.start : end * self.size - b.start, :])

    def of(self, b: Block) -> tuple[Rows, Rows]:
        """The scale and the zero point, [M] each, of every column of the block; a symmetric grid has no zero points."""
        index = torch.arange(b.start, b.stop) if self.order_N is None else self.order_N[..., b.start : b.stop]
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


def _rounded(
    w_MN: Tensor,
    seen: InputStatistics,
    now: int | slice,
    grid: Grid,
    order_N: Tensor | None,
    block: int,
    damp: float,
    dtype: torch.dtype,
) -> tuple[Tensor, _Levels]:
    levels = _Levels(w_MN, grid, order_N, dtype)
    factor_NN = factor(seen, now, damp, order_N)
    ordered_MN = w_MN if order_N is None else w_MN.take_along_dim(order_N[..., None, :], dim=-1)
    codes_NM = torch.empty(*w_MN.shape[:-2], w_MN.shape[-1], w_MN.shape[-2], dtype=torch.int8, device=w_MN.device)
    for b in sweep(ordered_MN, factor_NN, block, levels.ahead):
        levels.enter(b)
        code_BM = torch.empty_like(b.error_BM)
        b.treat(_round(code_BM, *levels.of(b), grid))
        codes_NM[..., b.start : b.stop, :] = code_BM
    return (codes_NM if order_N is None else codes_NM.take_along_dim(order_N.argsort(-1)[..., None], dim=-2)), levels


def _round(code_BM: Tensor, scale_M: Rows, zero_M: Rows, grid: Grid) -> Column:
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


def _by_energy(seen: InputStatistics, now: int | slice) -> Tensor:
    each = range(len(seen.each))[now]
    if isinstance(each, range):
        return torch.stack([seen.squares(e).argsort(descending=True) for e in each])
    return seen.squares(each).argsort(descending=True)
