"""The exact error of keeping only a subset of a layer's experts, for many subsets at once.

Shapes are suffixes: T tokens, D model width, E experts, S subsets, C the full
layer and the subsets. Lu et al., "Not All Experts are Equal", ACL 2024, section 3.2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moeflow.methods.prune.subsets import Subset
from moeflow.model.alternatives import slices
from moeflow.model.moe import MoELayer
from moeflow.model.router import dense

ELEMENTS_AT_ONCE = 1 << 24
"""The most elements in the largest intermediate tensors of a chunk of tokens."""


def mask_of(subsets: Sequence[Subset], experts: int, device: torch.device | str = "cpu") -> Tensor:
    """The experts that each subset allows, bool [S, E]; all subsets have the same size."""
    return torch.zeros(len(subsets), experts, dtype=torch.bool).scatter_(1, torch.tensor(subsets), True).to(device)


@torch.inference_mode()
def squared_errors(moe: MoELayer, x_TD: Tensor, mask_SE: Tensor, target_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The squared error of the layer's output for every subset, summed over tokens, fp64 [S], and the output's squared norm [].

    Every expert runs once per token. The error of a subset is then exactly c' G c, where G is the Gram matrix of the experts'
    outputs and c the change of the routing weights. `target_TD` is what the layer should output: the original model's output on the
    same tokens. It enters the Gram matrix as one more vector with coefficient -1.
    """
    experts, subsets = moe.num_experts, len(mask_SE)
    error_S = torch.zeros(subsets, dtype=torch.float64, device=x_TD.device)
    norm = torch.zeros((), dtype=torch.float64, device=x_TD.device)
    for rows in slices(len(x_TD), max(1, min(1024, ELEMENTS_AT_ONCE // (experts * max(subsets, x_TD.shape[1]))))):
        x_tD = x_TD[rows]
        logits_tE = moe.logits(x_tD)
        y_tED = moe.expert_outputs(x_tD).double()
        c_StE = dense(*moe.router.choose(logits_tE, mask_SE[:, None, :]), experts).double()
        full_tE = dense(*moe.router.choose(logits_tE), experts).double()
        shared_tD = moe.shared_output(x_tD)
        if target_TD is None:
            vectors_tVD, c_StV = y_tED, c_StE - full_tE
            out_tD = torch.einsum("te,ted->td", full_tE, y_tED)
            out_tD = out_tD if shared_tD is None else out_tD + shared_tD.double()
        else:
            out_tD = target_TD[rows].double()
            rest_tD = out_tD if shared_tD is None else out_tD - shared_tD.double()
            vectors_tVD = torch.cat([y_tED, rest_tD[:, None]], dim=1)
            c_StV = torch.cat([c_StE, -torch.ones_like(c_StE[..., :1])], dim=-1)
        gram_tVV = vectors_tVD @ vectors_tVD.mT
        c_tSV = c_StV.transpose(0, 1)
        error_S += ((c_tSV @ gram_tVV) * c_tSV).sum((0, 2))
        norm += out_tD.square().sum()
    return error_S.clamp(min=0), norm


@torch.inference_mode()
def squared_errors_by_expert(
    moe: MoELayer, x_TD: Tensor, mask_SE: Tensor, target_TD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same without Gram matrices, which is cheaper for a few subsets of many experts: their outputs are added up one by one.

    An expert runs once, on the tokens that any subset sends to it.
    """
    experts, subsets = moe.num_experts, len(mask_SE)
    error_S = torch.zeros(subsets, dtype=torch.float64, device=x_TD.device)
    norm = torch.zeros((), dtype=torch.float64, device=x_TD.device)
    for rows in slices(len(x_TD), max(1, ELEMENTS_AT_ONCE // ((subsets + 1) * x_TD.shape[1]))):
        x_tD = x_TD[rows]
        logits_tE = moe.logits(x_tD)
        full_1tE = dense(*moe.router.choose(logits_tE), experts)[None]
        weight_CtE = torch.cat([full_1tE, dense(*moe.router.choose(logits_tE, mask_SE[:, None, :]), experts)]).double()
        out_CtD = torch.zeros(subsets + 1, *x_tD.shape, dtype=torch.float64, device=x_TD.device)
        for e, expert in enumerate(moe.experts):
            (token,) = torch.where((weight_CtE[..., e] != 0).any(0))
            if len(token):
                y_tD = expert(moe.expert_input(x_tD[token], logits_tE[token], e)).double()
                out_CtD[:, token] += weight_CtE[:, token, e, None] * y_tD
        if (shared_tD := moe.shared_output(x_tD)) is not None:
            out_CtD += shared_tD.double()
        goal_tD = out_CtD[0] if target_TD is None else target_TD[rows].double()
        error_S += (out_CtD[1:] - goal_tD).square().sum((1, 2))
        norm += goal_tD.square().sum()
    return error_S, norm
