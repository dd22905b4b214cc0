"""Scaling of experts' inputs before rounding, so that those that matter most lose least, and clipping of ranges (AWQ).

Shapes are suffixes: T tokens, E experts, D model width, F expert width, M outputs and N inputs of a matrix, G groups of g inputs, R
points of a search. Tensors are plain; nothing here knows routers or model classes. Everything that a norm feeds is scaled together:
the norm's weight is divided by the scale, and the columns of *every* matrix that it feeds, including the router and a shared
expert's, are multiplied by it. In exact arithmetic the block's outputs and its routing stay the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from moeflow.methods.moments import second_moment
from moeflow.methods.slim.grid import Grid
from moeflow.methods.slim.masks import Inputs, InputStatistics, check_weight, matrices
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.quantized import Quantized
from moeflow.methods.slim.rounding import round_to_nearest, scales
from moeflow.methods.slim.scaled import ScaledExperts
from moeflow.model.moe import ACTIVATIONS

POINTS = 20
"""How many exponents the scale search tries, and into how many steps clipping divides a group's range."""

MAX_SHRINK = 0.5
"""The largest part of a group's range that clipping may remove."""

TOKENS_AT_ONCE = 4096
"""How many rows run through an expert at once."""


@torch.no_grad()
def awq(
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    grid: Grid,
    *,
    inputs: Tensor,
    weights: Tensor,
    act: str = "silu",
    clip: bool = True,
    scale_dtype: torch.dtype = torch.float32,
) -> ScaledExperts:
    """Put a layer's experts on a grid by activation-aware scaling (Lin et al., MLSys 2024, section 3.2) and clipping.

    `inputs` [T, D] are the block's inputs, after its norm; `weights` [T, E] are the routing weights, zero for experts not chosen.
    gate and up of all experts share one scale, chosen by the error of the layer's output; each down has its own, chosen by the
    error of its own outputs. An expert without tokens does not count in the error, and is rounded to nearest with the shared scale.
    Raises ValueError if shapes do not fit, a group does not divide a width, numbers are not finite or no token chose any expert.
    """
    experts, inner = _check_layer(gate_EFD, up_EFD, down_EDF, grid, inputs, weights, act)
    tokens = [weights[:, e].nonzero().squeeze(-1) for e in range(experts)]
    seen = [e for e in range(experts) if len(tokens[e])]
    activation = ACTIVATIONS[act]

    def between(gate_FD: Tensor, up_FD: Tensor, x_TD: Tensor) -> Tensor:
        return activation(linear(x_TD, gate_FD.float())) * linear(x_TD, up_FD.float())

    def outputs(fed: Sequence[Tensor]) -> Tensor:
        out_TD = torch.zeros(inputs.shape, dtype=torch.float32, device=inputs.device)
        for at, e in enumerate(seen):
            gate_FD, up_FD = fed[2 * at], fed[2 * at + 1]
            for now in tokens[e].split(TOKENS_AT_ONCE):
                inner_TF = between(gate_FD, up_FD, inputs[now].float())
                out_TD.index_add_(0, now, linear(inner_TF, down_EDF[e].float()) * weights[now, e, None].float())
        return out_TD

    scale_D = balance([m[e] for e in seen for m in (gate_EFD, up_EFD)], grid, inputs=inputs, outputs=outputs)
    inner_EF = torch.ones(experts, inner, dtype=torch.float32, device=inputs.device)
    made: list[list[Quantized]] = [[], [], []]
    for e in range(experts):
        gate_FD, up_FD, down_DF = (m[e].float() for m in (gate_EFD, up_EFD, down_EDF))
        if len(tokens[e]):
            x_TD = inputs[tokens[e]].float()
            inner_TF = between(gate_FD, up_FD, x_TD)
            moment_FF = second_moment(inner_TF)
            if inner_TF.any():
                inner_EF[e] = balance_one(down_DF, grid, moment=moment_FF, inputs=inner_TF)
        scaled = [gate_FD * scale_D, up_FD * scale_D / inner_EF[e, :, None], down_DF * inner_EF[e]]
        if clip and len(tokens[e]):
            moment_DD = second_moment(x_TD / scale_D)
            moments = [moment_DD, moment_DD, moment_FF / inner_EF[e].outer(inner_EF[e])]
            scaled = [clipped(w, grid, moment=s) if s.any() else w for w, s in zip(scaled, moments, strict=True)]
        for into, w in zip(made, scaled, strict=True):
            into.append(round_to_nearest(w, grid, scale_dtype=scale_dtype))
    gate, up, down = (Quantized.stacked(parts) for parts in made)
    return ScaledExperts(gate, up, down, scale_D, inner_EF)


def treat(
    gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, how: Slimming,
    *, inputs: Tensor, weights: Tensor, act: str, scale_dtype: torch.dtype,
) -> ScaledExperts:  # fmt: skip
    """AWQ's function in the table of methods."""
    return awq(gate_EFD, up_EFD, down_EDF, how.grid, inputs=inputs, weights=weights, act=act, scale_dtype=scale_dtype)


@torch.no_grad()
def balance(
    weights: Sequence[Tensor], grid: Grid, *, inputs: Tensor, outputs: Callable[[Sequence[Tensor]], Tensor], points: int = POINTS
) -> Tensor:
    """The scale [N] of inputs that several matrices share, chosen so that rounding changes the result of `outputs` least.

    `weights` are the matrices [M, N] to round and `inputs` [.., N] their inputs. `outputs` computes with the matrices that it is
    given; each is rounded, in fp32, when it is read. The scale is mean|x|^r / mean|w|^(1-r), with |w| relative to its group's
    largest, clamped to at least 1e-4, then divided by the root of its largest times its smallest; `points` values of r from 0 are
    tried (Lin et al., MLSys 2024, section 3.2, as released). Raises ValueError if shapes do not fit or no error is finite.
    """
    for w_MN in weights:
        check_weight(w_MN)
        grid.check(w_MN.shape[-1])
    _check_inputs(inputs, {w.shape[-1] for w in weights})
    wanted = outputs(weights)

    def error(scale_N: Tensor) -> Tensor:
        return (outputs(_Rounded(weights, scale_N, grid)) - wanted).double().square().sum()

    return _best(_candidates(weights, inputs, grid, points), error)


@torch.no_grad()
def balance_one(w_MN: Tensor, grid: Grid, *, moment: Tensor | None = None, inputs: Inputs, points: int = POINTS) -> Tensor:
    """The scale [N] of one matrix's inputs, chosen so that rounding changes the matrix's own outputs least; see `balance`.

    The error comes from the second moment [N, N] of the inputs, which is computed if it is not given. In a batch, each matrix has
    its own. Raises ValueError if statistics do not fit, are not finite or are zero.
    """
    check_weight(w_MN)
    columns = w_MN.shape[-1]
    grid.check(columns)
    tokens = InputStatistics.of(w_MN, None, inputs, instead="round_to_nearest()")
    seen = tokens if moment is None else InputStatistics.of(w_MN, moment, None, instead="round_to_nearest()")
    found = [_balanced(w, grid, seen.moment(e).float(), tokens.each[e], points) for e, w in enumerate(matrices(w_MN))]
    return torch.stack(found).reshape(*w_MN.shape[:-2], columns)


@torch.no_grad()
def clipped(
    w_MN: Tensor,
    grid: Grid,
    *,
    moment: Tensor | None = None,
    inputs: Inputs | None = None,
    points: int = POINTS,
    max_shrink: float = MAX_SHRINK,
) -> Tensor:
    """The weight [M, N] with each group of a row clipped to the range whose rounding changes the group's outputs least.

    The ranges shrink in steps of 1 / `points`, down to 1 - `max_shrink`. AWQ's released code tries them on a sample of tokens (Lin
    et al., MLSys 2024); here the second moment stands for all tokens. Raises ValueError if statistics do not fit or are zero.
    """
    check_weight(w_MN)
    groups = grid.groups(w_MN.shape[-1])
    if points < 1 or not 0 <= max_shrink <= 1:
        raise ValueError(f"points={points} must be at least 1 and max_shrink={max_shrink} between 0 and 1; 20 and 0.5 are usual")
    w_EMN, seen = matrices(w_MN), InputStatistics.of(w_MN, moment, inputs, instead="round_to_nearest()")
    out_EMN = torch.empty_like(w_EMN)
    for e, w in enumerate(w_EMN):
        w_GMg = w.float().unflatten(-1, (groups, -1)).transpose(0, 1)
        size = w_GMg.shape[-1]
        blocks_GgGg = seen.moment(e).reshape(groups, size, groups, size)
        moment_Ggg = torch.stack([blocks_GgGg[g, :, g] for g in range(groups)]).float()
        most_GM1 = w_GMg.abs().amax(-1, keepdim=True)
        best_GM1, least_GM1 = most_GM1.clone(), torch.full_like(most_GM1, float("inf"))
        for step in range(max(int(max_shrink * points), 1)):
            bound_GM1 = most_GM1 * (1 - step / points)
            change_GMg = _nearest(w_GMg.clamp(-bound_GM1, bound_GM1), grid) - w_GMg
            error_GM1 = ((change_GMg @ moment_Ggg) * change_GMg).sum(-1, keepdim=True)
            better = error_GM1 < least_GM1
            best_GM1, least_GM1 = torch.where(better, bound_GM1, best_GM1), torch.where(better, error_GM1, least_GM1)
        out_EMN[e] = w_GMg.clamp(-best_GM1, best_GM1).transpose(0, 1).flatten(-2)
    return out_EMN.reshape(w_MN.shape)


def _balanced(w_MN: Tensor, grid: Grid, moment_NN: Tensor, x_TN: Tensor, points: int) -> Tensor:
    def error(scale_N: Tensor) -> Tensor:
        change_MN = _rounded(w_MN, scale_N, grid) - w_MN.float()
        return ((change_MN @ moment_NN) * change_MN).sum(dtype=torch.float64)

    return _best(_candidates([w_MN], x_TN, grid, points), error)


def _candidates(weights: Sequence[Tensor], inputs: Tensor, grid: Grid, points: int) -> Tensor:
    if points < 1:
        raise ValueError(f"points={points} must be at least 1; 20 are usual")
    columns = inputs.shape[-1]
    x_N = inputs.reshape(-1, columns).abs().mean(0, dtype=torch.float32)
    total_N = torch.zeros(columns, dtype=torch.float32, device=inputs.device)
    for w_MN in weights:
        size_MGg = w_MN.float().abs().unflatten(-1, (grid.groups(columns), -1))
        total_N += (size_MGg / (size_MGg.amax(-1, keepdim=True) + 1e-6)).flatten(-2).reshape(-1, columns).sum(0)
    w_N = total_N / sum(w[..., 0].numel() for w in weights)
    power_R1 = torch.arange(points, device=inputs.device)[:, None] / points
    found_RN = (x_N.pow(power_R1) / (w_N.pow(1 - power_R1) + 1e-4)).clamp(min=1e-4)
    return found_RN / (found_RN.amax(-1, keepdim=True) * found_RN.amin(-1, keepdim=True)).sqrt()


def _best(scale_RN: Tensor, error: Callable[[Tensor], Tensor]) -> Tensor:
    error_R = torch.stack([error(scale_N) for scale_N in scale_RN])
    if not error_R.isfinite().any():
        raise ValueError("no scale gives a finite error; look for overflow in the activations")
    return scale_RN[error_R.nan_to_num(float("inf")).argmin()]


class _Rounded(Sequence[Tensor]):
    """The rounded forms of matrices, each computed when it is read."""

    def __init__(self, weights: Sequence[Tensor], scale_N: Tensor, grid: Grid) -> None:
        self.weights, self.scale_N, self.grid = weights, scale_N, grid

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: Any) -> Any:
        found = self.weights[index]
        if isinstance(index, slice):
            return _Rounded(found, self.scale_N, self.grid)
        return _rounded(found, self.scale_N, self.grid)


def _rounded(w_MN: Tensor, scale_N: Tensor, grid: Grid) -> Tensor:
    """The matrix scaled, rounded and divided by the scale again: fp32 [M, N]."""
    groups = grid.groups(w_MN.shape[-1])
    return _nearest((w_MN.float() * scale_N).unflatten(-1, (groups, -1)), grid).flatten(-2).div_(scale_N)


def _nearest(w_MGg: Tensor, grid: Grid) -> Tensor:
    scale, zero = scales(*torch.aminmax(w_MGg, dim=-1, keepdim=True), grid)
    code = (w_MGg / scale).round_()
    if zero is None:
        return code.clamp_(grid.lowest, grid.highest).mul_(scale)
    return code.add_(zero).clamp_(grid.lowest, grid.highest).sub_(zero).mul_(scale)


def _check_inputs(inputs: Tensor, columns: set[int]) -> None:
    if columns != {inputs.shape[-1]}:
        raise ValueError(f"inputs have {inputs.shape[-1]} columns, the matrices {sorted(columns)}; balance what shares an input")
    if not inputs.numel() or not inputs.isfinite().all():
        raise ValueError(f"inputs of shape {tuple(inputs.shape)} must be finite tokens, and one at least; calibrate on more text")


def _check_layer(
    gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, grid: Grid, inputs: Tensor, weights: Tensor, act: str
) -> tuple[int, int]:
    for w in (gate_EFD, up_EFD, down_EDF):
        check_weight(w)
    if gate_EFD.dim() != 3 or up_EFD.shape != gate_EFD.shape or down_EDF.shape != gate_EFD.mT.shape:
        shapes = ", ".join(str(tuple(w.shape)) for w in (gate_EFD, up_EFD, down_EDF))
        raise ValueError(f"gate, up and down have shapes {shapes}; give [E, F, D], [E, F, D] and [E, D, F]")
    experts, inner, width = gate_EFD.shape
    if inputs.dim() != 2 or inputs.shape[-1] != width or tuple(weights.shape) != (len(inputs), experts):
        raise ValueError(
            f"inputs {tuple(inputs.shape)} and weights {tuple(weights.shape)} must be [T, {width}] and [T, {experts}] of one T"
        )
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} must be one of {', '.join(ACTIVATIONS)}")
    grid.check(width)
    grid.check(inner)
    if not weights.isfinite().all() or not weights.any():
        raise ValueError("weights must be finite, and some token choose some expert; use round_to_nearest() without tokens")
    return experts, inner
