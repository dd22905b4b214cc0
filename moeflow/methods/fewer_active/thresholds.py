"""The threshold of dynamic skipping in one layer, from its router's logits: the tensor side of `skipping`.

Shapes are suffixes: T tokens, E experts, k experts a token.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moeflow.arch import Family
from moeflow.model.checkpoint import Tensors
from moeflow.model.fewer_active import by_weight, left_out, statistic
from moeflow.model.layout import Files
from moeflow.model.router import Router


@torch.inference_mode()
def threshold(
    family: Family, layer_files: Files, shards: Sequence[Files], *, layer: int, rule: str, active: float | Literal["median"]
) -> tuple[Tensor, dict[str, Any]]:
    """The threshold (a scalar, fp32), and facts about it: the statistic's mean, the mean experts per token, the tokens.

    `active`: the mean number of experts per token, or "median": the threshold is the median of the statistic.
    """
    bias = family.router_bias(layer)
    bias_E = None if bias is None else Tensors(layer_files)[bias].float().view(-1)
    logits = [Tensors(s)["logits_TE"] for s in shards]
    router = Router.of(family, logits[0].shape[1], bias_E)
    weights_Tk = torch.cat([by_weight(*router.choose(logits_TE))[0] for logits_TE in logits])
    statistic_Tj = statistic(weights_Tk, rule)
    value = median(statistic_Tj) if active == "median" else threshold_for(statistic_Tj, active)
    stay_Tk = ~left_out(weights_Tk, rule, value)
    mean, stay = float(statistic_Tj.double().mean()), float(stay_Tk.double().sum(-1).mean())
    return value, {"threshold": float(value), "mean": mean, "active": stay, "tokens": len(weights_Tk)}


def median(values: Tensor) -> Tensor:
    """The middle value, or the mean of the two middle values; torch's own median takes the lower one."""
    ordered = values.flatten().sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def threshold_for(statistic_Tj: Tensor, active: float) -> Tensor:
    """The threshold at which a token keeps `active` experts on average, from the statistic of its experts after the first.

    The statistic falls from each expert of a token to the next, so a token keeps its experts up to the first below the threshold:
    one per value above it. The threshold lies midway between two values, so a different rounding of the weights moves few tokens
    across it, and none in fp32.
    """
    values = statistic_Tj.flatten().sort(descending=True).values
    stay = min(round((active - 1) * len(statistic_Tj)), len(values) - 1)
    return (values[stay - 1] + values[stay]) / 2 if stay else 2 * values[0]
