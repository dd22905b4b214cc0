"""Scaling of experts' inputs before rounding, so that those that matter most lose least, and clipping of ranges (AWQ).

Shapes are suffixes: T tokens, E experts, D model width, F expert width, M outputs and N inputs of a matrix, G groups of g inputs, R
points of a search. Tensors are plain; nothing here knows routers or model classes. Everything that a norm feeds is scaled together:
the norm's weight is divided by the scale, and the columns of *every* matrix that it feeds, including the router and a shared
expert's, are multiplied by it. In exact arithmetic the block's outputs and its routing stay the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from moeflow.methods.moments import check_weight, second_moment
from moeflow.methods.slim.grid import Grid
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.quantized import Quantized
from moeflow.methods.slim.rounding import round_to_nearest, scales
from moeflow.model.moe import ACTIVATIONS

POINTS = 20
"""How many exponents the scale search tries, and into how many steps clipping divides a group's range."""

MAX_SHRINK = 0.5
"""The largest part of a group's range that clipping may remove."""

TOKENS_AT_ONCE = 4096
"""How many rows run through an expert at once."""


@dataclass(frozen=True)
class ScaledExperts:
    """A layer's experts on a grid, and the scales that keep the block's outputs the same.

    `scale_D` divides the norm's weight and multiplies the columns of all that the norm feeds (`fold` does both). The experts
    already contain it, and also `inner_EF`, which divides the rows of up and multiplies the columns of down.
    """

    gate_EFD: Quantized
    up_EFD: Quantized
    down_EDF: Quantized
    scale_D: Tensor
    inner_EF: Tensor


def fold(norm_D: Tensor, scale_D: Tensor, *fed: Tensor) -> tuple[Tensor, ...]:
    """Divide the norm's weight [D] by the scale and multiply each matrix that it feeds, [.., D], by it, in their own dtypes.

    Give *all* that the norm feeds: the router, a shared expert's own gate, its gate and up matrices, and experts that are not
    scaled yet.
    """
    return (norm_D.float() / scale_D).to(norm_D.dtype), *((m.float() * scale_D).to(m.dtype) for m in fed)


@torch.no_grad()
def awq(
    gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, how: Slimming,
    *, inputs: Tensor, weights: Tensor, act: str = "silu", scale_dtype: torch.dtype = torch.float32,
) -> ScaledExperts:  # fmt: skip
    """Put a layer's experts on a grid by activation-aware scaling (Lin et al., MLSys 2024, section 3.2) and clipping.

    `inputs` [T, D] are the block's inputs, after its norm; `weights` [T, E] are the routing weights, zero for experts not chosen.
    gate and up of all experts share one scale, chosen by the error of the layer's output; each down has its own, chosen by the
    error of its own outputs. An expert without tokens does not count in the error, and is rounded to nearest with the shared scale.
    Raises ValueError if a group does not divide a width, numbers are not finite or no token chose any expert.
    """
    for w in (gate_EFD, up_EFD, down_EDF):
        check_weight(w)
    if not inputs.isfinite().all():
        raise ValueError("the inputs are not finite; look for overflow in the activations")
    if not weights.isfinite().all() or not weights.any():
        raise ValueError("weights must be finite, and some token choose some expert; use round_to_nearest() without tokens")
    grid, activation, experts = how.grid, ACTIVATIONS[act], len(gate_EFD)
    tokens = [weights[:, e].nonzero().squeeze(-1) for e in range(experts)]
    reached = [e for e in range(experts) if len(tokens[e])]

    def between(gate_FD: Tensor, up_FD: Tensor, x_TD: Tensor) -> Tensor:
        return activation(linear(x_TD, gate_FD.float())) * linear(x_TD, up_FD.float())

    def outputs(form: Callable[[Tensor], Tensor]) -> Tensor:
        out_TD = torch.zeros(inputs.shape, dtype=torch.float32, device=inputs.device)
        for e in reached:
            gate_FD, up_FD = form(gate_EFD[e]), form(up_EFD[e])
            for now in tokens[e].split(TOKENS_AT_ONCE):
                inner_TF = between(gate_FD, up_FD, inputs[now].float())
                out_TD.index_add_(0, now, linear(inner_TF, down_EDF[e].float()) * weights[now, e, None].float())
        return out_TD

    scale_D = balance([m[e] for e in reached for m in (gate_EFD, up_EFD)], grid, inputs, outputs)
    inner_EF = torch.ones(down_EDF.shape[::2], dtype=torch.float32, device=inputs.device)
    made: list[list[Quantized]] = [[], [], []]
    for e in range(experts):
        gate_FD, up_FD, down_DF = (m[e].float() for m in (gate_EFD, up_EFD, down_EDF))
        if len(tokens[e]):
            x_TD = inputs[tokens[e]].float()
            inner_TF = between(gate_FD, up_FD, x_TD)
            moment_FF = second_moment(inner_TF)
            if inner_TF.any():
                inner_EF[e] = balance_one(down_DF, grid, inner_TF, moment_FF)
        scaled = [gate_FD * scale_D, up_FD * scale_D / inner_EF[e, :, None], down_DF * inner_EF[e]]
        if len(tokens[e]):
            moment_DD = second_moment(x_TD / scale_D)
            moments = [moment_DD, moment_DD, moment_FF / inner_EF[e].outer(inner_EF[e])]
            scaled = [clipped(w, grid, s) if s.any() else w for w, s in zip(scaled, moments, strict=True)]
        for into, w in zip(made, scaled, strict=True):
            into.append(round_to_nearest(w, None, how, scale_dtype))
    gate, up, down = (Quantized.stacked(parts) for parts in made)
    return ScaledExperts(gate, up, down, scale_D, inner_EF)


@torch.no_grad()
def balance(
    weights: Sequence[Tensor], grid: Grid, inputs: Tensor, outputs: Callable[[Callable[[Tensor], Tensor]], Tensor]
) -> Tensor:
    """The scale [N] of inputs that several matrices share, chosen so that rounding changes the result of `outputs` least.

    `weights` are the matrices [M, N] to round and `inputs` [.., N] their inputs. `outputs` computes with the form of each matrix
    that the function which it is given makes of it. The scale is mean|x|^r / mean|w|^(1-r), with |w| relative to its group's
    largest, clamped to at least 1e-4, then divided by the root of its largest times its smallest; `POINTS` values of r from 0 are
    tried (Lin et al., MLSys 2024, section 3.2, as released). Raises ValueError if no error is finite.
    """
    wanted = outputs(lambda w_MN: w_MN)

    def error(scale_N: Tensor) -> Tensor:
        return (outputs(lambda w_MN: _rounded(w_MN, scale_N, grid)) - wanted).double().square().sum()

    return _best(weights, grid, inputs, error)


@torch.no_grad()
def balance_one(w_MN: Tensor, grid: Grid, x_TN: Tensor, moment_NN: Tensor) -> Tensor:
    """The scale [N] of one matrix's inputs [T, N], chosen so that rounding changes the matrix's own outputs least; see `balance`.

    The error comes from the second moment of the inputs.
    """
    moment_NN = moment_NN.float()

    def error(scale_N: Tensor) -> Tensor:
        change_MN = _rounded(w_MN, scale_N, grid) - w_MN.float()
        return ((change_MN @ moment_NN) * change_MN).sum(dtype=torch.float64)

    return _best([w_MN], grid, x_TN, error)


@torch.no_grad()
def clipped(w_MN: Tensor, grid: Grid, moment_NN: Tensor) -> Tensor:
    """The weight [M, N] with each group of a row clipped to the range whose rounding changes the group's outputs least.

    The ranges shrink in steps of 1 / `POINTS`, down to 1 - `MAX_SHRINK`. AWQ's released code tries them on a sample of tokens (Lin
    et al., MLSys 2024); here the second moment stands for all tokens.
    """
    groups = grid.groups(w_MN.shape[-1])
    w_GMg = w_MN.float().unflatten(-1, (groups, -1)).transpose(0, 1)
    size = w_GMg.shape[-1]
    tiles_GgGg = moment_NN.reshape(groups, size, groups, size)
    moment_Ggg = torch.stack([tiles_GgGg[g, :, g] for g in range(groups)]).float()
    most_GM1 = w_GMg.abs().amax(-1, keepdim=True)
    best_GM1, least_GM1 = most_GM1.clone(), torch.full_like(most_GM1, float("inf"))
    for step in range(int(MAX_SHRINK * POINTS)):
        bound_GM1 = most_GM1 * (1 - step / POINTS)
        change_GMg = _nearest(w_GMg.clamp(-bound_GM1, bound_GM1), grid) - w_GMg
        error_GM1 = ((change_GMg @ moment_Ggg) * change_GMg).sum(-1, keepdim=True)
        better = error_GM1 < least_GM1
        best_GM1, least_GM1 = torch.where(better, bound_GM1, best_GM1), torch.where(better, error_GM1, least_GM1)
    return w_GMg.clamp(-best_GM1, best_GM1).transpose(0, 1).flatten(-2)


def _best(weights: Sequence[Tensor], grid: Grid, inputs: Tensor, error: Callable[[Tensor], Tensor]) -> Tensor:
    """The scale [N] with the smallest error, of those that `balance` tries."""
    columns = inputs.shape[-1]
    x_N = inputs.reshape(-1, columns).abs().mean(0, dtype=torch.float32)
    total_N = torch.zeros(columns, dtype=torch.float32, device=inputs.device)
    for w_MN in weights:
        size_MGg = w_MN.float().abs().unflatten(-1, (grid.groups(columns), -1))
        total_N += (size_MGg / (size_MGg.amax(-1, keepdim=True) + 1e-6)).flatten(-2).sum(0)
    w_N = total_N / sum(len(w) for w in weights)
    power_R1 = torch.arange(POINTS, device=inputs.device)[:, None] / POINTS
    raw_RN = (x_N.pow(power_R1) / (w_N.pow(1 - power_R1) + 1e-4)).clamp(min=1e-4)
    scale_RN = raw_RN / (raw_RN.amax(-1, keepdim=True) * raw_RN.amin(-1, keepdim=True)).sqrt()
    error_R = torch.stack([error(scale_N) for scale_N in scale_RN])
    if not error_R.isfinite().any():
        raise ValueError("no scale gives a finite error; look for overflow in the activations")
    return scale_RN[error_R.nan_to_num(float("inf")).argmin()]


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
