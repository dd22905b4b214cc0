"""How a router turns logits into expert indices and weights, for every family, and for any subset of the experts.

Shapes are suffixes: T tokens, E experts, k experts a token. Leading dimensions ("...") broadcast, so that many subsets can route at
once.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeflow.arch import Arch, Family


@dataclass(frozen=True)
class Router:
    """The rule by which one layer's router chooses experts. `bias_E` is added to the scores for the choice only."""

    arch: Arch
    top_k: int
    groups: int = 1
    topk_groups: int = 1
    normalize: bool = True
    scale: float = 1.0
    jitter: float = 0.0
    bias_E: Tensor | None = None

    @staticmethod
    def of(family: Family, experts: int, bias_E: Tensor | None = None) -> "Router":
        """The router of a layer with `experts` experts."""
        groups, topk_groups = family.group_limit
        return Router(
            arch=family.arch,
            top_k=family.experts_per_token(experts),
            groups=groups,
            topk_groups=topk_groups,
            normalize=family.normalizes,
            scale=family.scale,
            jitter=float(family.config.get("router_jitter_noise") or 0.0),
            bias_E=bias_E,
        )

    def keep(self, experts: list[int]) -> "Router":
        """The router of the layer with only these experts."""
        return replace(self, bias_E=None if self.bias_E is None else self.bias_E[experts])

    def can_spare(self, experts: int) -> bool:
        """Whether any one of a layer's `experts` can be forbidden while every token still gets its top k."""
        least = 2 if self.groups > 1 and self.arch.group_score == "top2" else 1
        left = experts // self.groups - 1
        return left >= least and (self.top_k < experts if self.groups == 1 else left * self.topk_groups >= self.top_k)

    def choose(self, logits: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [..., k] (fp32) and indices [..., k] (int64) of the chosen experts, in no particular order.

        `logits` is [..., E]. `allowed` [..., E] (bool, broadcast against the logits) forbids the other experts exactly as if their
        rows were sliced out of the router. The caller must allow enough of them (`Family.check_keep`).
        """
        logits = logits.float()
        if allowed is not None and self.arch.score != "sigmoid":
            logits = logits.masked_fill(~allowed, -torch.inf)
        if self.arch.score == "sparsemixer":
            return self._sparsemixer(logits)
        if self.arch.score == "sigmoid":
            value = logits.sigmoid()
            choice = value if self.bias_E is None else value + self.bias_E
            # mask after the bias is added: it would survive a mask before the sigmoid
            choice = choice if allowed is None else choice.masked_fill(~allowed, -torch.inf)
            outside = -torch.inf
        else:
            choice = value = logits.softmax(-1)
            outside = 0.0
        if self.groups > 1:
            choice = self._limit_groups(choice, outside)
            value = choice if self.arch.score == "softmax" else value
        index = choice.topk(self.top_k, dim=-1).indices
        weights = value.expand_as(choice).gather(-1, index)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if self.arch.score == "sigmoid" else 0.0))
        return weights * self.scale, index

    def scores(self, logits: Tensor) -> Tensor:
        """The score of every expert, chosen or not, [..., E], fp32: softmax, or sigmoid if the family uses that."""
        return logits.float().sigmoid() if self.arch.score == "sigmoid" else logits.float().softmax(-1)

    def _limit_groups(self, choice: Tensor, outside: float) -> Tensor:
        """Forbid all but the best groups, ranked by their best expert (DeepSeek-V2, arXiv 2405.04434, 2.1.2) or by their two best
        (DeepSeek-V3, arXiv 2412.19437, 2.1.2)."""
        by_group = choice.unflatten(-1, (self.groups, -1))
        score = by_group.amax(-1) if self.arch.group_score == "max" else by_group.topk(2, dim=-1).values.sum(-1)
        best = score.topk(self.topk_groups, dim=-1).indices
        inside = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
        return by_group.masked_fill(~inside.unsqueeze(-1), outside).flatten(-2)

    def _sparsemixer(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Two experts, each weighted by a softmax over the logits close to its own (SparseMixer-v2, arXiv 2409.12136)."""
        weights, indices = [], []
        scores = logits
        for _ in range(2):
            best, index = scores.max(-1, keepdim=True)
            far = (best - logits) / logits.abs().clamp(min=best) > 2 * self.jitter
            weights.append(scores.masked_fill(far, -torch.inf).softmax(-1).gather(-1, index))
            indices.append(index)
            scores = scores.scatter(-1, index, -torch.inf)
        return torch.cat(weights, -1), torch.cat(indices, -1)


def dense(weights: Tensor, index: Tensor, experts: int) -> Tensor:
    """Routing weights over all experts, [..., E]; zero for an expert that was not chosen."""
    return weights.new_zeros(*weights.shape[:-1], experts).scatter_(-1, index, weights)
