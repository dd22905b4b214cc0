"""Scores by which single experts are kept: what costs nothing beside a calibration. Higher stays.

Shapes: E experts. Pure functions of a layer's summed statistics or of its weights.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moeflow.model.moe import MoELayer, whole

Stats = Mapping[str, Tensor]
"""Sums over calibration tokens, as `moeflow.model.observe.Recorder` leaves them, added over shards."""


def random_order(moe: MoELayer, stats: Stats, seed: int) -> Tensor:
    """A random order, the same for the same seed."""
    return torch.rand(moe.num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frequency(moe: MoELayer, stats: Stats, seed: int) -> Tensor:
    """How many tokens are routed to each expert."""
    return stats["count_E"]


def router_score(moe: MoELayer, stats: Stats, seed: int) -> Tensor:
    """The router's mean score of each expert over all tokens, chosen or not (He et al., arXiv 2406.02500, Expert Drop)."""
    return stats["score_E"] / stats["tokens"]


def reap(moe: MoELayer, stats: Stats, seed: int) -> Tensor:
    """The mean of routing weight times output norm over the tokens routed to each expert (REAP, arXiv 2510.13999)."""
    return stats["reap_E"] / stats["count_E"].clamp(min=1)


def aimer(moe: MoELayer, stats: Stats, seed: int) -> Tensor:
    """Minus mean |w| over root mean square of w, from the weights alone (AIMER, arXiv 2603.18492: the highest ratio goes)."""
    scores = []
    for expert in moe.experts:
        w = torch.cat([whole(m).reshape(-1).double() for m in (expert.gate_FD, expert.up_FD, expert.down_DF)])
        scores.append(-w.abs().mean() / w.square().mean().sqrt())
    return torch.stack(scores)


SCORES: dict[str, Callable[[MoELayer, Stats, int], Tensor]] = {
    "random": random_order,
    "frequency": frequency,
    "router_score": router_score,
    "reap": reap,
    "aimer": aimer,
}


def best_by_score(score_E: Tensor, keep: int, groups: int = 1) -> list[int]:
    """The `keep` experts with the highest score, ascending, the same number in every group; the lower number wins a tie."""
    size = len(score_E) // groups
    kept: list[int] = []
    for g in range(groups):
        order = torch.sort(score_E[g * size : (g + 1) * size], descending=True, stable=True).indices
        kept += [g * size + int(e) for e in order[: keep // groups]]
    return sorted(kept)
