"""Second moments of the inputs of experts' matrices: all that whitening, GPTQ, SparseGPT and Wanda need to know of the tokens.

Shapes are suffixes: T tokens, N inputs of a matrix, R outputs of a factor, D model width, F expert width. Tensors stay on their
device.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moeflow.model.moe import MLP, MoELayer

TOKENS_AT_ONCE = 4096
"""How many rows are multiplied in the tokens' own precision, at least fp32, before the product is added to an fp64 sum."""


Moments = dict[str, dict[str, Tensor]]
"""For an expert's "gate", "up" and "down", a second moment over its routed tokens, as a keyword argument of `whitened`,
`components` and `energies`: of the matrix's inputs, or of down's outputs if they are not wider; sums in fp64."""


@torch.no_grad()
def second_moment(x_TN: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """The sum over tokens of each row's outer product with itself, the row first multiplied by its weight: fp64 [N, N]."""
    total_NN = torch.zeros(x_TN.shape[-1], x_TN.shape[-1], dtype=torch.float64, device=x_TN.device)
    for at in range(0, len(x_TN), TOKENS_AT_ONCE):
        rows_TN = x_TN[at : at + TOKENS_AT_ONCE]
        rows_TN = rows_TN.to(torch.promote_types(rows_TN.dtype, torch.float32))
        if weight_T is not None:
            rows_TN = rows_TN * weight_T[at : at + TOKENS_AT_ONCE, None].to(rows_TN.dtype)
        total_NN += rows_TN.mT @ rows_TN
    return total_NN


@torch.no_grad()
def moment_behind(a_RN: Tensor, moment_NN: Tensor) -> Tensor:
    """The second moment [R, R], fp64, of a matrix's outputs, from the second moment [N, N] of its inputs.

    With fewer tokens than R, some outputs are zero on all tokens, and rounding can leave sums of squares slightly below zero: they
    are set to zero.
    """
    moment_RR = a_RN.double() @ moment_NN @ a_RN.double().mT
    moment_RR.diagonal().clamp_(min=0)
    return moment_RR


@torch.no_grad()
def expert_moments(expert: MLP, x_TD: Tensor, weight_T: Tensor | None = None) -> Moments:
    """The moments of one expert over the tokens routed to it, weighted by their routing weights unless these are None.

    With weights, the error of the down matrix is that of the layer's output; without, every token counts the same.
    """
    width, inner = x_TD.shape[-1], expert.up_FD.shape[0] if isinstance(expert.up_FD, Tensor) else expert.up_FD.out_MR.shape[0]
    down_NN = torch.zeros(min(width, inner), min(width, inner), dtype=torch.float64, device=x_TD.device)
    for at in range(0, len(x_TD), TOKENS_AT_ONCE):
        x_tD = x_TD[at : at + TOKENS_AT_ONCE]
        weight_t = None if weight_T is None else weight_T[at : at + TOKENS_AT_ONCE]
        down_NN += second_moment(expert(x_tD) if width <= inner else expert.inner(x_tD), weight_t)
    inputs = {"input_moment_NN": second_moment(x_TD, weight_T)}
    return {"gate": inputs, "up": inputs, "down": {"output_moment_MM" if width <= inner else "input_moment_NN": down_NN}}


@torch.no_grad()
def layer_moments(moe: MoELayer, x_TD: Tensor, *, weighted: bool = True) -> Iterator[Moments]:
    """The moments of each expert of a layer in turn, over the tokens that the layer's router sends to it."""
    weights_Tk, index_Tk = moe.router.choose(moe.logits(x_TD))
    for e, expert in enumerate(moe.experts):
        token, slot = torch.where(index_Tk == e)
        yield expert_moments(expert, x_TD[token], weights_Tk[token, slot] if weighted else None)
