"""Which of its chosen experts a token is computed by: dynamic skipping, and Compressed Experts in the place of those left out.

Modules that stand inside a layer's fused experts, behind the router and before the products. Shapes are suffixes: T tokens, E
experts, k chosen experts a token, m of them computed, a the others, V the width of a vector: that of the model or of an expert.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moeflow.model.formats import FORMS


class Scales(NamedTuple):
    """What a token's computed experts see: factors of the input of gate and of up [T, D], and of the input of down [T, F].

    `gate` and `up` are one tensor in the form of one vector, and `inner` is None there.
    """

    gate: Tensor
    up: Tensor
    inner: Tensor | None


def by_weight(weights_Tk: Tensor, index_Tk: Tensor) -> tuple[Tensor, Tensor]:
    """Both, the largest weight first."""
    weights_Tk, order_Tk = weights_Tk.sort(dim=-1, descending=True, stable=True)
    return weights_Tk, index_Tk.gather(-1, order_Tk)


class Skip(nn.Module):
    """Leaves out a token's least experts (NAEE, Lu et al., ACL 2024, arXiv 2402.14800, section 3.3 and appendix A.2).

    With `rule` "ratio", for two experts, the second where its weight is below `threshold` times that of the first. With "tail", for
    any number: the first i stay for the least i at which the others have at most `threshold` of all weight. `renormalize`: those
    that stay take over the weight of the others, as in families whose weights are normalised.
    """

    def __init__(self, rule: str, *, renormalize: bool) -> None:
        super().__init__()
        self.rule, self.renormalize = rule, renormalize
        self.register_buffer(rule, torch.zeros((), dtype=torch.float32))

    @property
    def threshold(self) -> Tensor:
        return getattr(self, self.rule)

    def forward(self, weights_Tk: Tensor, index_Tk: Tensor, experts: int) -> tuple[Tensor, Tensor]:
        """Weights and indices of the experts that stay; for one that is left out the weight 0 and the index `experts`."""
        weights_Tk, index_Tk = by_weight(weights_Tk, index_Tk)
        left_Tk = left_out(weights_Tk, self.rule, self.threshold)
        stay_Tk = weights_Tk.masked_fill(left_Tk, 0)
        if self.renormalize:
            stay_Tk = stay_Tk * (weights_Tk.sum(-1, keepdim=True) / stay_Tk.sum(-1, keepdim=True))
        return stay_Tk, index_Tk.masked_fill(left_Tk, experts)


def statistic(weights_Tk: Tensor, rule: str) -> Tensor:
    """What is held against the threshold, for each expert behind a token's first: [T, k-1], fp32; `weights_Tk` in order.

    By "ratio" its weight over the first one's. By "tail" the part of all weight that it and those behind it have.
    """
    weights_Tk = weights_Tk.float()
    if rule == "ratio":
        return weights_Tk[:, 1:] / weights_Tk[:, :1]
    tail_Tk = weights_Tk.flip(-1).cumsum(-1).flip(-1)
    return tail_Tk[:, 1:] / tail_Tk[:, :1]


def left_out(weights_Tk: Tensor, rule: str, threshold: Tensor) -> Tensor:
    """Whether each of a token's experts is left out, bool [T, k]; `weights_Tk` in order."""
    of_Tj = statistic(weights_Tk, rule)
    left_Tj = of_Tj < threshold.float() if rule == "ratio" else of_Tj <= threshold.float()
    return torch.cat([torch.zeros_like(left_Tj[:, :1]), left_Tj], dim=-1)


class CompressedExperts(nn.Module):
    """Vectors in the place of the experts that are not computed (He et al., EMNLP Findings 2025, arXiv 2503.00634, section 2).

    Of a token's k experts the first `main` are computed, on an input that the vectors of the others scale, each by its part of the
    others' weight; the first by weight, or where the router is `ordered` by its choice. Form "three" has a vector for what gate, up
    and down are applied to (the authors' code), "one" a single one for what gate and up are applied to (the paper). Vectors are
    kept as their difference from one: a zero leaves everything as it is.
    """

    def __init__(self, form: str, experts: int, width: int, inner: int, *, main: int, ordered: bool) -> None:
        super().__init__()
        self.form, self.main, self.ordered = form, main, ordered
        for vector in FORMS[form]:
            self.register_parameter(vector, nn.Parameter(torch.zeros(experts, inner if vector == "inner" else width)))

    def forward(self, weights_Tk: Tensor, index_Tk: Tensor) -> tuple[Tensor, Tensor, Scales]:
        """Weights and indices of the experts that are computed, [T, m], and by what their inputs are scaled."""
        if not self.ordered:
            weights_Tk, index_Tk = by_weight(weights_Tk, index_Tk)
        weights_Tm, weights_Ta = weights_Tk.split([self.main, weights_Tk.shape[-1] - self.main], dim=-1)
        index_Tm, index_Ta = index_Tk.split([self.main, index_Tk.shape[-1] - self.main], dim=-1)
        # in fp32 and with a floor, so that no token's weights round to nothing before they are divided
        weights_Ta = weights_Ta.float()
        parts_Ta = weights_Ta / weights_Ta.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        # by attribute, where a sum with trained additions may stand in the parameter's place
        vectors = {name: self._scale(parts_Ta, index_Ta, getattr(self, name)) for name in FORMS[self.form]}
        if self.form == "one":
            return weights_Tm, index_Tm, Scales(vectors["input"], vectors["input"], None)
        return weights_Tm, index_Tm, Scales(**vectors)

    @staticmethod
    def _scale(parts_Ta: Tensor, index_Ta: Tensor, vector_EV: Tensor) -> Tensor:
        """One plus the weighted sum of the others' vectors, [T, V] fp32: a product over all experts is cheaper than a look-up."""
        parts_TE = parts_Ta.new_zeros(len(parts_Ta), len(vector_EV)).scatter(-1, index_Ta, parts_Ta)
        return 1 + parts_TE @ vector_EV.float()
