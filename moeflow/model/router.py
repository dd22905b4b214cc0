"""How a router turns logits into expert indices and weights, for every family, and for any subset of the experts.

Shapes are suffixes: T tokens, E experts, k experts a token. Leading dimensions ("...") broadcast, so that many subsets can route at
once.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

from moeflow.arch import Arch, Family

JITTER = 0.01
"""How near to the best a second expert must be to be weighed against it, where config.json says nothing: as transformers has it."""


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
            jitter=float(JITTER if (noise := family.config.get("router_jitter_noise")) is None else noise),
            bias_E=bias_E,
        )

    def keep(self, experts: list[int]) -> "Router":
        """The router of the layer with only these experts."""
        return replace(self, bias_E=None if self.bias_E is None else self.bias_E[experts])

    def can_spare(self, experts: int, gone: int = 1) -> bool:
        """Whether any `gone` of a layer's `experts` can be forbidden while every token still gets its top k."""
        least = 2 if self.groups > 1 and self.arch.group_score == "top2" else 1
        left = experts // self.groups - gone
        return left >= least and (self.top_k <= left if self.groups == 1 else left * self.topk_groups >= self.top_k)

    def choose(self, logits: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [..., k] (fp32) and indices [..., k] (int64) of the chosen experts, in no particular order.

        They weigh the experts' outputs, and are one in a family that weighs inputs (`MoELayer.expert_input`).

        `logits` is [..., E]. `allowed` [..., E] (bool, broadcast against the logits) forbids the other experts exactly as if their
        rows were sliced out of the router. The caller must allow enough of them (`Family.check_keep`).
        """
        logits, score = logits.float(), self.arch.score
        if allowed is not None and (score in ("softmax", "sparsemixer") or self.arch.weighs_input):
            logits = logits.masked_fill(~allowed, -torch.inf)
        if score == "sparsemixer":
            return self._sparsemixer(logits)
        if self.arch.weighs_input:
            index = logits.topk(self.top_k, dim=-1).indices
            return torch.ones_like(index, dtype=logits.dtype), index
        value = self.scores(logits)
        choice = value if self.bias_E is None else value + self.bias_E
        outside = 0.0 if choice is value and score == "softmax" else -torch.inf
        if allowed is not None and outside:
            # mask after the bias is added: it would survive a mask before the score
            choice = choice.masked_fill(~allowed, outside)
        if self.groups > 1:
            limited = self._limit_groups(choice, outside)
            value, choice = (value if outside else limited), limited
        index = choice.topk(self.top_k, dim=-1).indices
        weights = value.expand_as(choice).gather(-1, index)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + (0.0 if score == "softmax" else 1e-20))
        return weights * self.scale, index

    def scores(self, logits: Tensor) -> Tensor:
        """The score of every expert, chosen or not, [..., E], fp32: softmax, or what else the family uses."""
        logits = logits.float()
        if self.arch.score == "sigmoid":
            return logits.sigmoid()
        return softplus(logits).sqrt() if self.arch.score == "sqrtsoftplus" else logits.softmax(-1)

    @property
    def chooses_again(self) -> bool:
        """Whether a token must be routed anew for every subset, since its order of experts depends on which are allowed."""
        biased_softmax = self.arch.score == "softmax" and self.bias_E is not None
        return self.groups > 1 or self.arch.score == "sparsemixer" or biased_softmax

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
