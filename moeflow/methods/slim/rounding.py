"""Rounding to the nearest point of a grid, whose scales come from the smallest and the largest weight of each group.

Shapes are suffixes: M outputs and N inputs of a matrix, G groups of inputs, g inputs of a group. Batch dimensions, such as a
layer's experts, may come first; tensors stay on their device.
"""

import torch
from torch import Tensor

from moeflow.methods.moments import check_weight, matrices
from moeflow.methods.slim.grid import Grid
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.quantized import Quantized


@torch.no_grad()
def round_to_nearest(w_MN: Tensor, moment_NN: Tensor | None, how: Slimming, scale_dtype: torch.dtype = torch.float32) -> Quantized:
    """Round each weight [M, N] to its nearest code, with scales rounded to `scale_dtype`.

    Raises ValueError if groups do not divide the columns or a weight is not finite.
    """
    check_weight(w_MN)
    grid = how.grid
    groups = grid.groups(w_MN.shape[-1])
    if w_MN.dim() > 2:  # one by one, so that only one at a time is in fp32
        each = [round_to_nearest(w, None, how, scale_dtype) for w in matrices(w_MN)]
        return Quantized.stacked(each).reshaped(*w_MN.shape[:-2])
    w_MGg = w_MN.float().unflatten(-1, (groups, -1))
    scale_MG, zero_MG = scales(*torch.aminmax(w_MGg, dim=-1), grid, scale_dtype)
    code_MGg = (w_MGg / scale_MG[..., None]).round_()
    if zero_MG is not None:
        code_MGg += zero_MG[..., None]
    code_MN = code_MGg.clamp_(grid.lowest, grid.highest).to(torch.int8).flatten(-2)
    return Quantized(code_MN, scale_MG.to(scale_dtype), None if zero_MG is None else zero_MG.to(torch.int8), grid)


def scales(low: Tensor, high: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    """The scale of weights between `low` and `high`, and unless symmetric the signed zero point; all fp32 and of one shape.

    Zero is always on the grid; weights that are all zero get the range from -1 to 1. This follows GPTQ's reference implementation
    (Frantar et al., ICLR 2023), which however halves the range of a symmetric group without negative weights. The scale is rounded
    to `dtype`. Raises ValueError if it is too large for `dtype`.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    flat = (low == 0) & (high == 0)
    low, high = low.masked_fill(flat, -1.0), high.masked_fill(flat, 1.0)
    levels = high.new_tensor(grid.levels)  # by a Python number a GPU divides less exactly: by its reciprocal
    scale = ((high - low) / levels).to(dtype).float().clamp_(min=torch.finfo(dtype).tiny)
    if not scale.isfinite().all():
        raise ValueError(f"a scale is above {torch.finfo(dtype).max:g}, the largest {dtype}; give another scale_dtype")
    if grid.symmetric:
        return scale, None
    return scale, (-low / scale).round_().clamp_(0, grid.levels).add_(grid.lowest)
