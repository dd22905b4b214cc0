"""Computing fewer of a token's chosen experts: dynamic skipping, and Compressed Experts.

The modules here are part of a layer's fused experts and run between the router and the matrix products. Shapes are suffixes: T
tokens, E experts, k chosen experts a token, m of them computed, a the others, D model width, F expert width, V one of the two, j
all chosen experts but the first.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moeflow.model.formats import FORMS


class Scales(NamedTuple):
    """Factors of the inputs of a token's computed experts: of gate and up [T, D], and of down [T, F].

    In the form "one", `gate` and `up` are the same tensor and `inner` is None.
    """

    gate: Tensor
    up: Tensor
    inner: Tensor | None


def by_weight(weights_Tk: Tensor, index_Tk: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and indices sorted by weight, the largest first."""
    weights_Tk, order_Tk = weights_Tk.sort(dim=-1, descending=True, stable=True)
    return weights_Tk, index_Tk.gather(-1, order_Tk)


class Skip(nn.Module):
    """Skips the experts of a token with the smallest weights (NAEE, Lu et al., ACL 2024, arXiv 2402.14800, 3.3 and A.2).

    The rule "ratio", for two experts a token, skips the second if its weight is below `threshold` times that of the first. The rule
    "tail", for any number, keeps the first i, for the smallest i at which the others have at most `threshold` of the total weight.
    With `renormalize` the weights of those that stay are scaled to the same sum as before, as in families with normalized weights.
    """

    def __init__(self, rule: str, *, renormalize: bool) -> None:
        super().__init__()
        self.rule, self.renormalize = rule, renormalize
        self.register_buffer(rule, torch.zeros((), dtype=torch.float32))

    @property
    def threshold(self) -> Tensor:
        return getattr(self, self.rule)

    def forward(self, weights_Tk: Tensor, index_Tk: Tensor, experts: int) -> tuple[Tensor, Tensor]:
        """Weights and indices of the experts that stay; a skipped one has the weight 0 and the index `experts`."""
        weights_Tk, index_Tk = by_weight(weights_Tk, index_Tk)
        left_Tk = left_out(weights_Tk, self.rule, self.threshold)
        stay_Tk = weights_Tk.masked_fill(left_Tk, 0)
        if self.renormalize:
            stay_Tk = stay_Tk * (weights_Tk.sum(-1, keepdim=True) / stay_Tk.sum(-1, keepdim=True))
        return stay_Tk, index_Tk.masked_fill(left_Tk, experts)


def statistic(weights_Tk: Tensor, rule: str) -> Tensor:
    """What is compared with the threshold, for each expert of a token but the first: [T, k-1], fp32.

    `weights_Tk` is sorted. For the rule "ratio" it is the expert's weight divided by the first one's, for "tail" the part of the
    total weight that the expert and those after it have.
    """
    weights_Tk = weights_Tk.float()
    if rule == "ratio":
        return weights_Tk[:, 1:] / weights_Tk[:, :1]
    tail_Tk = weights_Tk.flip(-1).cumsum(-1).flip(-1)
    return tail_Tk[:, 1:] / tail_Tk[:, :1]


def left_out(weights_Tk: Tensor, rule: str, threshold: Tensor) -> Tensor:
    """Whether each of a token's experts is skipped, bool [T, k]; `weights_Tk` is sorted."""
    of_Tj = statistic(weights_Tk, rule)
    left_Tj = of_Tj < threshold.float() if rule == "ratio" else of_Tj <= threshold.float()
    return torch.cat([torch.zeros_like(left_Tj[:, :1]), left_Tj], dim=-1)


class CompressedExperts(nn.Module):
    """Vectors replace the experts that are not computed (He et al., EMNLP Findings 2025, arXiv 2503.00634, section 2).

    Of a token's k experts the first `main` are computed: the first by weight, or in the router's order if it is `ordered`. Their
    inputs are scaled by the mean of the others' vectors, weighted by their routing weights. The form "three" has vectors for the
    inputs of gate, up and down (the authors' code), the form "one" a single vector for the input of gate and up (the paper).
    Vectors are stored as their difference from one, so that zeros change nothing.
    """

    def __init__(self, form: str, experts: int, width: int, inner: int, *, main: int, ordered: bool) -> None:
        super().__init__()
        self.form, self.main, self.ordered = form, main, ordered
        for vector in FORMS[form]:
            self.register_parameter(vector, nn.Parameter(torch.zeros(experts, inner if vector == "inner" else width)))

    def forward(self, weights_Tk: Tensor, index_Tk: Tensor) -> tuple[Tensor, Tensor, Scales]:
        """Weights and indices of the experts that are computed, [T, m], and the factors of their inputs."""
        if not self.ordered:
            weights_Tk, index_Tk = by_weight(weights_Tk, index_Tk)
        weights_Tm, weights_Ta = weights_Tk.split([self.main, weights_Tk.shape[-1] - self.main], dim=-1)
        index_Tm, index_Ta = index_Tk.split([self.main, index_Tk.shape[-1] - self.main], dim=-1)
        # in fp32 and with a floor, so that no token's weights round to nothing before they are divided
        weights_Ta = weights_Ta.float()
        parts_Ta = weights_Ta / weights_Ta.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        # by attribute, because LoRA may replace the parameter by a sum
        vectors = {name: self._scale(parts_Ta, index_Ta, getattr(self, name)) for name in FORMS[self.form]}
        if self.form == "one":
            return weights_Tm, index_Tm, Scales(vectors["input"], vectors["input"], None)
        return weights_Tm, index_Tm, Scales(**vectors)

    @staticmethod
    def _scale(parts_Ta: Tensor, index_Ta: Tensor, vector_EV: Tensor) -> Tensor:
        """One plus the weighted sum of the others' vectors, [T, V], fp32. A product over all experts is cheaper than a look-up."""
        parts_TE = parts_Ta.new_zeros(len(parts_Ta), len(vector_EV)).scatter(-1, index_Ta, parts_Ta)
        return 1 + parts_TE @ vector_EV.float()
