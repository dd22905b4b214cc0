"""The kernel behind `moeflow.model.ragged`, in Triton; see there. Importing this file needs Triton."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    """How the work is divided: `tile` rows of an expert by `across` rows of its matrix, `deep` columns at once."""

    tile: int  # at least 16, as tensor cores ask
    across: int
    deep: int
    warps: int
    stages: int


def tiles(each: float, dtype: torch.dtype) -> Tiles:
    """The division where an expert has `each` rows on average: of several that were timed on an H200, the fastest."""
    if dtype == torch.float32:
        return Tiles(16 if each <= 16 else 32, 64, 32, 4, 3)
    if each <= 16:
        return Tiles(16, 128, 128, 4, 3)
    if each <= 64:
        return Tiles(64, 64, 64, 4, 4)
    return Tiles(64, 128, 64, 4, 3) if each <= 256 else Tiles(128, 256, 64, 8, 3)


def launch(x_SN: Tensor, weights: Tensor, matrices_E3: Tensor, ends_E: Tensor, out_SM: Tensor, *, align: int) -> None:
    """Compute `ragged.times` into `out_SM`. The inner dimension of `x_SN` and `out_SM` must be contiguous."""
    rows, experts = len(x_SN), len(ends_E)
    now = tiles(rows / experts, x_SN.dtype)
    # each expert fills its tiles but the last: never more tiles than these, and those that are too many end at once
    grid = (triton.cdiv(rows, now.tile) + min(experts, rows), triton.cdiv(out_SM.shape[1], now.across))
    _times[grid](
        x_SN, weights, out_SM, matrices_E3, ends_E, x_SN.stride(0), out_SM.stride(0), experts,
        ALL=triton.next_power_of_2(experts), TILE=now.tile, ACROSS=now.across, DEEP=now.deep, ALIGN=align,
        num_warps=now.warps, num_stages=now.stages,
    )  # fmt: skip


@triton.jit
def _times(
    x, w, out, matrices, ends, x_stride, out_stride, experts,
    ALL: tl.constexpr, TILE: tl.constexpr, ACROSS: tl.constexpr, DEEP: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One tile: `TILE` rows of one expert by `ACROSS` rows of its matrix. A kernel takes pointers and numbers, and no values."""
    at = tl.program_id(0)
    every = tl.arange(0, ALL)
    end_E = tl.load(ends + every, mask=every < experts, other=0)
    begin_E = tl.load(ends + every - 1, mask=(every > 0) & (every < experts), other=0)
    tiles_E = tl.where(every < experts, (end_E - begin_E + TILE - 1) // TILE, 0)
    expert = tl.sum((tl.cumsum(tiles_E, 0) <= at).to(tl.int32), 0)
    if expert >= experts:
        return
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    row = begin + (at - tl.sum(tl.where(every < expert, tiles_E, 0), 0)) * TILE + tl.arange(0, TILE)
    here = row < tl.load(ends + expert)
    start = tl.multiple_of(tl.load(matrices + 3 * expert), ALIGN)
    height = tl.load(matrices + 3 * expert + 1).to(tl.int32)
    width = tl.multiple_of(tl.load(matrices + 3 * expert + 2).to(tl.int32), ALIGN)
    m = tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)
    if tl.program_id(1) * ACROSS >= height:
        return
    n = tl.arange(0, DEEP)
    x_at = x + row.to(tl.int64)[:, None] * x_stride + n[None, :]
    w_at = w + start + m.to(tl.int64)[None, :] * width + n[:, None]
    total = tl.zeros((TILE, ACROSS), dtype=tl.float32)
    for done in range(0, width, DEEP):
        inside = n < width - done
        a = tl.load(x_at + done, mask=here[:, None] & inside[None, :], other=0.0)
        b = tl.load(w_at + done, mask=(m < height)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")  # of bf16 it is exact anyway
    where = out + row.to(tl.int64)[:, None] * out_stride + m[None, :]
    tl.store(where, total.to(out.dtype.element_ty), mask=here[:, None] & (m < height)[None, :])
