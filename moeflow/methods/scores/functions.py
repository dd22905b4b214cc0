"""The scores of single experts, from a layer's summed statistics or its weights, and the experts that they keep.

Shapes are suffixes: E experts, G groups, k kept of each. `layer` is None if the score's row says that it reads no weights.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moeflow.methods.graph import load
from moeflow.methods.scores import SCORES
from moeflow.model.moe import MoELayer, whole

Stats = Mapping[str, Tensor]
"""Sums over calibration tokens from `moeflow.model.observe.Recorder`, added over shards."""


def random_order(layer: None, stats: Stats, seed: int) -> Tensor:
    """A random order, the same for the same seed."""
    return torch.rand(len(stats["count_E"]), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frequency(layer: None, stats: Stats, seed: int) -> Tensor:
    """How many tokens are routed to each expert."""
    return stats["count_E"]


def router_score(layer: None, stats: Stats, seed: int) -> Tensor:
    """The router's mean score of each expert over all tokens, chosen or not (He et al., arXiv 2406.02500, Expert Drop)."""
    return stats["score_E"] / stats["tokens"]


def routing_weight(layer: None, stats: Stats, seed: int) -> Tensor:
    """The mean routing weight of each expert over all tokens, zero for those not routed to it (Expert Drop's code for DeepSeek)."""
    return stats["weight_E"] / stats["tokens"]


def reap(layer: None, stats: Stats, seed: int) -> Tensor:
    """The mean of routing weight times output norm over the tokens routed to each expert (REAP, arXiv 2510.13999)."""
    return stats["reap_E"] / stats["count_E"].clamp(min=1)


def aimer(layer: MoELayer, stats: Stats, seed: int) -> Tensor:
    """Minus mean |w| over root mean square of w, from the weights alone (AIMER, arXiv 2603.18492: the highest ratio goes)."""
    scores = []
    for expert in layer.experts:
        w = torch.cat([whole(m).reshape(-1).double() for m in expert.matrices])
        scores.append(-w.abs().mean() / w.square().mean().sqrt())
    return torch.stack(scores)


def best_by_score(score_E: Tensor, keep: int, groups: int = 1) -> list[int]:
    """The `keep` experts with the highest scores, ascending, the same number in every group; the lower index wins a tie."""
    size = len(score_E) // groups
    best_Gk = score_E.view(groups, size).sort(descending=True, stable=True).indices[:, : keep // groups].cpu()
    return sorted((best_Gk + size * torch.arange(groups)[:, None]).flatten().tolist())


def baselines(layer: MoELayer, stats: Stats, seed: int, keep: int) -> dict[str, tuple[int, ...]]:
    """The `keep` experts that each score would keep in this layer, by the score's name."""
    scores = {name: load(row.code)(layer, stats, seed) for name, row in SCORES.items()}
    return {name: tuple(best_by_score(score_E, keep, layer.router.groups)) for name, score_E in scores.items()}
