"""Second moments of the inputs of experts' matrices: all that whitening, GPTQ, SparseGPT and Wanda need to know of the tokens.

Shapes are suffixes: T tokens, E matrices of a batch, M outputs and N inputs of a matrix, R outputs of a factor, D model width, F
expert width. Tensors stay on their device.
"""

from collections.abc import Iterable, Iterator
from functools import reduce

import torch
from torch import Tensor

from moeflow.model.moe import MLP, MoELayer, apply

TOKENS_AT_ONCE = 4096
"""How many rows are multiplied in the tokens' own precision, at least fp32, before the product is added to an fp64 sum."""

INNER_AT_ONCE = 2048
"""Of how many tokens an expert's inner activations, which are several times as wide, are there at once."""

COLUMNS_AT_ONCE = 512
"""How many columns of a symmetric matrix are processed at once."""

Moments = dict[str, dict[str, Tensor]]
"""For an expert's "gate", "up" and "down", a second moment over its routed tokens, as a keyword argument of `components`:
of the matrix's inputs, or of down's outputs if they are not wider; sums in fp64."""


def matrices(w_MN: Tensor) -> Tensor:
    """The matrices with all batch dimensions merged into one: [E, M, N]."""
    return w_MN.reshape(-1, *w_MN.shape[-2:])


def check_weight(w_MN: Tensor) -> None:
    """Raise ValueError if this matrix, or one of a batch, is not finite."""
    if bad := [e for e, one in enumerate(matrices(w_MN)) if not _largest(one).isfinite()]:
        raise ValueError(f"the weight{_which(w_MN, *bad)} is not finite; the checkpoint is damaged")


def check_moment(moment_NN: Tensor, shape: tuple[int, ...], name: str, instead: str) -> None:
    """Raise ValueError unless this is a second moment, or a batch of them, of this shape.

    `name`: what messages call it; `instead`: the function that they recommend, which needs no tokens.
    """
    if tuple(moment_NN.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(moment_NN.shape)}, the matrix asks for {shape}")
    for e, one_NN in enumerate(matrices(moment_NN)):
        subject, largest = name + _which(moment_NN, e), _largest(one_NN)
        if not largest.isfinite():
            raise ValueError(f"{subject} is not finite; look for overflow in the activations of its tokens")
        if largest == 0:
            raise ValueError(
                f"{subject} is zero: no tokens were seen; calibrate on more text, take {instead}() or keep the matrix whole"
            )
        for i in range(0, len(one_NN), COLUMNS_AT_ONCE):
            now = slice(i, i + COLUMNS_AT_ONCE)
            if _largest(one_NN[now, i:] - one_NN[i:, now].mT) > 1e-4 * largest:
                raise ValueError(f"{subject} is not symmetric; a second moment is the sum of x x'")
        if one_NN.diagonal().amin() < -1e-6 * largest:  # smaller ones are rounding errors
            raise ValueError(f"{subject} has a negative diagonal, which no second moment has; compute it again")


def _which(x_MN: Tensor, *indices: int) -> str:
    """These matrices of a batch, as the end of a message's subject."""
    return "" if x_MN.dim() == 2 else f" of matrix {', '.join(map(str, indices))}"


def _largest(x_MN: Tensor) -> Tensor:
    """The largest absolute element, without a copy of the matrix."""
    return torch.maximum(x_MN.amax(), -x_MN.amin())


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
def inner_moment(expert: MLP, x_TD: Tensor) -> Tensor:
    """The second moment of what an expert's last matrix takes in, for inputs of the expert: fp64 [F, F]."""
    return reduce(torch.add, (second_moment(expert.inner(x_tD)) for x_tD in x_TD.split(INNER_AT_ONCE)))


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
        inner_tF = expert.inner(x_tD)
        down_NN += second_moment(apply(expert.down_DF, inner_tF) if width <= inner else inner_tF, weight_t)
    inputs = {"input_moment_NN": second_moment(x_TD, weight_T)}
    return {"gate": inputs, "up": inputs, "down": {"output_moment_MM" if width <= inner else "input_moment_NN": down_NN}}


@torch.no_grad()
def layer_moments(moe: MoELayer, x_TD: Tensor, *, weighted: bool = True, experts: Iterable[int] | None = None) -> Iterator[Moments]:
    """The moments of each of these experts of a layer in turn, or of all, over the tokens that the layer's router sends to it."""
    logits_TE = moe.logits(x_TD)
    weights_Tk, index_Tk = moe.router.choose(logits_TE)
    for e in range(moe.num_experts) if experts is None else experts:
        token, slot = torch.where(index_Tk == e)
        yield expert_moments(
            moe.experts[e], moe.expert_input(x_TD[token], logits_TE[token], e), weights_Tk[token, slot] if weighted else None
        )
