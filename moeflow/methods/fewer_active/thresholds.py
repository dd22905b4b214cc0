"""The threshold of dynamic skipping in one layer, from its router's logits: the tensor side of `skipping`.

Shapes are suffixes: T tokens, E experts, k experts a token.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeflow.arch import Config, Family
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import Files
from moeflow.model.reach import by_weight, left_out, statistic
from moeflow.model.router import Router


@torch.inference_mode()
def threshold(
    config: Config, layer_file: Files, shards: Sequence[Files], *, layer: int, rule: str, active: float
) -> tuple[Tensor, dict[str, Any]]:
    """The threshold (a scalar, fp32), and what is told of it: the mean of what it is held against, the experts a token then has.

    `active`: the experts that a token has on average; 0: the threshold is the median.
    """
    family = Family.of(config)
    tensors = Tensors(layer_file)
    bias = family.router_bias(layer)
    bias_E = None if bias is None else tensors[bias].float()
    logits = [Tensors(s)["logits_TE"] for s in shards]
    router = Router.of(family, logits[0].shape[1], bias_E)
    weights_Tk = torch.cat([by_weight(*router.choose(logits_TE))[0] for logits_TE in logits])
    of_Tj = statistic(weights_Tk, rule)
    value = reaching(of_Tj, active) if active else median(of_Tj)
    left_Tk = left_out(weights_Tk, rule, value)
    return value, {
        "threshold": float(value),
        "mean": float(of_Tj.double().mean()),
        "active": float((~left_Tk).double().sum(-1).mean()),
        "tokens": len(weights_Tk),
    }


def median(values: Tensor) -> Tensor:
    """The middle value, or the mean of both: torch's own takes the lower one."""
    ordered = values.flatten().sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def reaching(of_Tj: Tensor, active: float) -> Tensor:
    """The threshold by which `active` experts stay on average, given what each token's experts behind the first are held against.

    The statistic falls from one expert of a token to its next, so that a token's experts stay up to the one that fails: their
    number is that of the values above the threshold. It lies between two values, so that rounding the weights otherwise moves few
    tokens over it, and none in fp32.
    """
    values = of_Tj.flatten().sort(descending=True).values
    stay = min(round((active - 1) * len(of_Tj)), len(values) - 1)
    return (values[stay - 1] + values[stay]) / 2 if stay else 2 * values[0]
