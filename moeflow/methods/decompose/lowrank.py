"""The matrix of rank R that changes an expert's outputs least, given the second moments of the expert's tokens.

Shapes are suffixes: T tokens, M outputs and N inputs of a matrix, K = min(M, N), R rank, D model width, F expert width. Batch
dimensions, such as a layer's experts, may come first; tensors stay on their device. With S the second moment of the inputs, the
optimum is U U' W, where U holds the leading eigenvectors of W S W', the second moment of the outputs (Chen et al., DRONE, NeurIPS
2021; Wang et al., SVD-LLM, ICLR 2025, reach the same matrix through a Cholesky factor of S). Neither S nor W is ever inverted, so a
singular S, from an expert with fewer tokens than inputs, needs no care.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeflow.methods.moments import COLUMNS_AT_ONCE, check_moment, check_weight
from moeflow.model.moe import LowRank

NOISE = 1e-4
"""If an eigenvalue at the cut is a smaller part of the largest, fp32 cannot tell it from its neighbours, and fp64 is used."""

ROUNDING = 1e-2
"""The largest eigenvalue is compared with; or this part of what weights and moment of their sizes could give, if that is more."""


@dataclass(frozen=True)
class Components:
    """A matrix as a sum of components, in descending order of what they add to its outputs, to be cut at any rank.

    `energy_K`, fp64: what each component adds to the squared norm of the outputs over the moment's tokens (a sum over tokens if the
    moment is a sum). The other fields are the matrix in an orthonormal frame and that frame's best basis.
    """

    energy_K: Tensor
    basis_KK: Tensor
    core_KN: Tensor
    frame_MK: Tensor | None
    dtype: torch.dtype

    def truncated(self, rank: int) -> LowRank:
        """The best matrix of this rank, as factors [M, R] and [R, N] whose columns and rows have equal norms."""
        _check_range(rank, self.energy_K.shape[-1])
        out_KR = self.basis_KK[..., :rank]
        in_RN = out_KR.mT @ self.core_KN
        return _balanced(out_KR if self.frame_MK is None else self.frame_MK @ out_KR, in_RN, self.dtype)

    def error(self, rank: int) -> Tensor:
        """The root of the summed squared change of the outputs at this rank, fp64: the root of the discarded energies' sum."""
        return self.energy_K[..., rank:].sum(-1).sqrt()


@torch.no_grad()
def components(
    w_MN: Tensor,
    *,
    input_moment_NN: Tensor | None = None,
    output_moment_MM: Tensor | None = None,
    shrink: float = 0.0,
    rank: int | None = None,
) -> Components:
    """The components of a matrix under the second moment of its inputs or of its outputs.

    Works on the smaller side (if M > N, on the R of W = Q R), in fp32 or the matrix's own precision if higher, and again in fp64 if
    fp32 gives up or cannot resolve the cut at `rank` (by default break-even). `shrink` adds that part of the moment's weight,
    spread evenly over all directions as if inputs were white; this helps experts with few tokens. A negative eigenvalue within
    rounding counts as zero. Raises ValueError for a bad moment (`check_moment`), and for one with a negative direction that the
    matrix sees.
    """
    rows, columns = w_MN.shape[-2:]
    moment, name, side = (
        (input_moment_NN, "input_moment_NN", columns) if output_moment_MM is None else (output_moment_MM, "output_moment_MM", rows)
    )
    assert moment is not None, "give the moment of the inputs or that of the outputs; without tokens there is vanilla()"
    check_weight(w_MN)
    check_moment(moment, (*w_MN.shape[:-2], side, side), name, "vanilla")
    cut = rank or int(rows * columns / (rows + columns))

    def gram(core_KN: Tensor, frame_MK: Tensor | None, moment: Tensor) -> Tensor:
        if output_moment_MM is None:
            gram_KK = _sandwich(core_KN, moment)
        else:
            gram_KK = moment.clone() if frame_MK is None else _sandwich(frame_MK.mT, moment)
        if shrink:
            white_KK = core_KN @ core_KN.mT
            scale = shrink * _trace(gram_KK) / _trace(white_KK).clamp(min=torch.finfo(white_KK.dtype).tiny)
            gram_KK += scale[..., None, None] * white_KK
        return gram_KK

    def solve(w_MN: Tensor, moment: Tensor) -> tuple[Tensor, ...]:
        if w_MN.dim() > 2 and w_MN.device.type == "cpu":
            # LAPACK has no batches, and one matrix at a time stays in the cache
            return tuple(torch.stack(part) for part in zip(*map(solve, w_MN, moment), strict=True))
        if rows <= columns:
            return torch.linalg.eigh(gram(w_MN, None, moment))
        frame_MK, core_KN = torch.linalg.qr(w_MN)
        return *torch.linalg.eigh(gram(core_KN, frame_MK, moment)), frame_MK, core_KN

    dtype = torch.promote_types(w_MN.dtype, torch.float32)
    value_K, basis_KK, *framed = _in_fp64_where_needed(solve, w_MN, moment, dtype, cut)
    frame_MK, core_KN = framed or (None, w_MN.to(dtype))
    most = _trace(moment) if output_moment_MM is not None else _trace(moment) * core_KN.double().square().sum((-2, -1))
    _check_positive(value_K, most, name, 1e-4 if dtype == torch.float32 else 1e-6)
    return Components(value_K.double().flip(-1).clamp(min=0), basis_KK.flip(-1), core_KN, frame_MK, w_MN.dtype)


@torch.no_grad()
def vanilla(w_MN: Tensor, rank: int) -> LowRank:
    """The truncated singular value decomposition (Yang et al., MoE-I2, EMNLP Findings 2024), by the smaller Gram matrix in fp64."""
    _check_range(rank, min(w_MN.shape[-2:]))
    if w_MN.shape[-2] > w_MN.shape[-1]:
        flipped = vanilla(w_MN.mT, rank)
        return LowRank(flipped.in_RN.mT.contiguous(), flipped.out_MR.mT.contiguous())
    check_weight(w_MN)
    wide_MN = w_MN.double()
    out_MR = torch.linalg.eigh(wide_MN @ wide_MN.mT)[1].flip(-1)[..., :rank]
    return _balanced(out_MR, out_MR.mT @ wide_MN, w_MN.dtype)


@torch.no_grad()
def energies(w_MN: Tensor) -> Tensor:
    """The squared singular values of a matrix, descending, fp64 [K]."""
    core_KL = (w_MN if w_MN.shape[-2] <= w_MN.shape[-1] else w_MN.mT).double()
    return torch.linalg.eigvalsh(core_KL @ core_KL.mT).flip(-1).clamp(min=0)


def _sandwich(a_KN: Tensor, s_NN: Tensor) -> Tensor:
    """A S A' for a symmetric S: the tiles below the diagonal and half of those on it, plus the transpose of that sum."""
    half_KK = a_KN.new_zeros(*a_KN.shape[:-1], a_KN.shape[-2])
    for at in range(0, a_KN.shape[-1], COLUMNS_AT_ONCE):
        now, behind = slice(at, at + COLUMNS_AT_ONCE), slice(at + COLUMNS_AT_ONCE, None)
        left_Kn = a_KN[..., now] @ s_NN[..., now, now] / 2 + a_KN[..., behind] @ s_NN[..., behind, now]
        half_KK += left_Kn @ a_KN[..., now].mT
    return half_KK + half_KK.mT


def _in_fp64_where_needed(
    solve: Callable[[Tensor, Tensor], tuple[Tensor, ...]], w_MN: Tensor, moment: Tensor, dtype: torch.dtype, cut: int
) -> tuple[Tensor, ...]:
    try:
        solved = solve(w_MN.to(dtype), moment.to(dtype))
    except torch.linalg.LinAlgError:  # a GPU's solver gives up in fp32 where eigenvalues lie close together
        if dtype == torch.float64:
            raise
        return tuple(part.to(dtype) for part in solve(w_MN.double(), moment.double()))
    if dtype == torch.float64 or cut >= min(w_MN.shape[-2:]):
        return solved
    value_K = solved[0]
    steep = value_K[..., -cut - 1] < NOISE * value_K[..., -1]
    if steep.any():
        for old, new in zip(solved, solve(w_MN[steep].double(), moment[steep].double()), strict=True):
            old[steep] = new.to(dtype)
    return solved


def _balanced(out_MR: Tensor, in_RN: Tensor, dtype: torch.dtype) -> LowRank:
    """Give both factors the same norms per component, so that neither training nor a low-precision format favours one."""
    out_R, in_R = torch.linalg.vector_norm(out_MR, dim=-2), torch.linalg.vector_norm(in_RN, dim=-1)
    scale_R = (in_R / out_R).sqrt().nan_to_num(1.0, 1.0)
    scale_R = torch.where(scale_R > 0, scale_R, torch.ones_like(scale_R))
    return LowRank((out_MR * scale_R[..., None, :]).to(dtype), (in_RN / scale_R[..., None]).to(dtype))


def _trace(x_NN: Tensor) -> Tensor:
    return x_NN.diagonal(dim1=-2, dim2=-1).sum(-1)


def _check_range(rank: int, most: int) -> None:
    if not 1 <= rank <= most:
        raise ValueError(f"rank={rank} must lie between 1 and the smaller side of the matrix, {most}")


def _check_positive(value_K: Tensor, most: Tensor, name: str, tolerance: float) -> None:
    """Raise ValueError if an eigenvalue is negative beyond rounding.

    Rounding is relative to the largest eigenvalue or, of a matrix that sees next to nothing of its tokens, to `most`, the sum that
    the eigenvalues could have.
    """
    largest = torch.maximum(value_K.amax(-1).to(most.dtype), ROUNDING * most)
    lowest = value_K.amin(-1) / largest.clamp(min=torch.finfo(most.dtype).tiny)
    if (lowest < -tolerance).any():
        raise ValueError(
            f"{name} is not positive semidefinite: an eigenvalue is {float(lowest.min()):.2g} of the largest, rounding explains "
            f"{-tolerance:g}; compute it again in fp64"
        )
