"""How many experts each layer keeps, out of one budget for the whole model: by the paper's rule, or exactly from measured curves.

Counts obey the router (top-k, the same number in every group), an optional list of counts that serving kernels accept, and
divisibility by a planned expert-parallel size. No torch.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import or_
from typing import Literal

from moeflow.arch import Family
from moeflow.methods.allocate import allocate_curves
from moeflow.methods.graph import Model
from moeflow.model.spec import LayerSpec
from moeflow.options import check_at_least, check_choices


@dataclass(frozen=True)
class Counts:
    """How many experts stay, and how they are spread over the layers. Raises ValueError for invalid options."""

    keep: float
    """How much of all layers' experts stays: a fraction up to 1, or an absolute amount above 1."""
    unit: Literal["experts", "parameters", "bytes"] = "experts"
    """The unit of keep."""
    rule: Literal["uniform", "paper", "exact"] = "exact"
    """uniform: the same number in each layer; paper: by importance, as in MoE-I²; exact: the least sum of measured costs."""
    importance: Literal["recon", "kl", "lm_loss"] = "kl"
    """The importance of an expert in the paper's rule: how far its layer's output (recon) or the model's predictions (kl) move
    without it, or how much the model's loss grows (lm_loss)."""
    together: int = 1
    """How many experts are left out at a time to measure kl or lm_loss, where each by itself costs too much; they share what it
    did by how much each changes its layer's output."""
    legal: tuple[int, ...] = ()
    """The numbers of experts that serving kernels accept; empty: any."""
    divisor: int = 1
    """The planned expert-parallel size: each number of experts is a multiple of it."""
    protected: tuple[tuple[int, int], ...] = ()
    """Experts that must stay, as pairs (layer, expert)."""
    grid: int = 8
    """The exact rule measures at most this many counts per layer, and interpolates between them."""
    measured: int = 16_384
    """Roughly how many calibration tokens run through the whole model for each alternative; their hidden states are kept."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, together=1)
        if self.divisor < 1:
            raise ValueError(f"divisor={self.divisor} must be at least 1")
        if self.grid < 2 or self.measured < 1:
            raise ValueError(
                f"grid={self.grid} counts must be at least 2, a curve's two ends, and measured={self.measured} tokens at least 1"
            )
        if any(len(pair) != 2 for pair in self.protected):
            raise ValueError(f"protected={list(self.protected)} must be pairs of a layer and an expert, as in [[0, 3], [2, 7]]")

    def protected_in(self, layer: int) -> list[int]:
        return [e for i, e in self.protected if i == layer]


def total_experts(model: Model, counts: Counts) -> int:
    """How many experts the whole model may keep. Raises ValueError if that is none, or more than it has."""
    amount, unit = counts.keep, counts.unit
    layers = [spec_of(model, i) for i in model.moe_layers]
    everything = sum(layer.experts for layer in layers)
    sizes = {layer.expert_numel / layer.experts for layer in layers}
    if unit != "experts" and (len(sizes) > 1 or any(layer.low_rank for layer in layers)):
        raise ValueError(f"the experts differ in size already, so that {unit} do not say how many stay; give the budget in experts")
    whole = {
        "experts": everything,
        "bytes": sum(layer.expert_bytes for layer in layers),
        "parameters": sum(layer.expert_numel for layer in layers),
    }[unit]
    part = amount if amount <= 1 else amount / whole
    if not 0 < part <= 1:
        raise ValueError(f"a budget of {amount:,} {unit} must lie between 0 and the {whole:,} that the model has")
    kept = part * everything
    return round(kept) if unit == "experts" or amount <= 1 else int(kept + 1e-9)


def legal_counts(model: Model, counts: Counts) -> dict[int, list[int]]:
    """The numbers of experts that each MoE layer may keep, ascending.

    Raises ValueError if a layer has no legal count, if a protected expert does not exist, and if a layer's number of experts is not
    known before a step has run.
    """
    family, allowed = Family.of(model.config), {}
    if strange := sorted({i for i, _ in counts.protected} - set(model.moe_layers)):
        raise ValueError(f"protected names {strange[0]!r}, which is no layer with experts; those are {model.moe_layers}")
    groups = family.group_limit[0]
    for i in model.moe_layers:
        if spec_of(model, i).share < 1:
            raise ValueError(
                f"how many experts layer {i} has is decided by a step of this graph; run it, pull the result and prune that"
            )
        experts, spared = spec_of(model, i).experts, counts.protected_in(i)
        if not all(0 <= e < experts for e in spared):
            raise ValueError(f"protected={spared} of layer {i} must be different experts between 0 and {experts - 1}")
        size = experts // groups
        least = max(sum(g * size <= e < (g + 1) * size for e in spared) for g in range(groups)) * groups
        legal = family.legal_counts(experts)
        allowed[i] = [n for n in legal if n >= least and n % counts.divisor == 0 and (not counts.legal or n in counts.legal)]
        if not allowed[i]:
            raise ValueError(
                f"layer {i} can keep {legal[0]} to {legal[-1]} of its {experts} experts, but no such count is among "
                f"{list(counts.legal) or 'all'}, divides by {counts.divisor} and covers {len(spared)} protected experts; loosen "
                "one of them"
            )
    return allowed


def check_total(total: int, legal: Mapping[int, Sequence[int]]) -> None:
    """Raise ValueError if no legal counts add up to `total`; the message has the nearest totals that work."""
    reachable = 1  # bit n: n experts in all
    for counts in legal.values():
        reachable = reduce(or_, (reachable << n for n in counts))
    if reachable >> total & 1:
        return
    sums = [n for n in range(reachable.bit_length()) if reachable >> n & 1]
    below, above = [n for n in sums if n < total][-1:], [n for n in sums if n > total][:1]
    raise ValueError(f"no legal counts add up to {total} experts; nearest: {' or '.join(map(str, below + above))}")


def spec_of(model: Model, layer: int) -> LayerSpec:
    return model.layers[layer].spec.output


def shares(weights: Mapping[int, float], caps: Mapping[int, int], amount: float) -> dict[int, float]:
    """Divide `amount` in proportion to `weights`, with no share above its cap; what a cap cuts off goes to the others."""
    parts = {i: 0.0 for i in weights}
    while amount > 1e-9 and (open_ := [i for i in weights if parts[i] < caps[i] - 1e-9]):
        whole, rest = sum(weights[i] for i in open_), amount
        for i in open_:
            more = min(caps[i] - parts[i], rest * weights[i] / whole)
            parts[i] += more
            amount -= more
    return parts


def neighbours(counts: Mapping[int, int], legal: Mapping[int, Collection[int]]) -> Iterator[dict[int, int]]:
    """All counts with the same total in which one layer is a legal step lower and another is higher by as much."""
    for i, n in counts.items():
        lower = max((m for m in legal[i] if m < n), default=n)
        for j in counts:
            if lower < n and j != i and counts[j] + n - lower in legal[j]:
                yield dict(counts) | {i: lower, j: counts[j] + n - lower}


def between(points: Sequence[tuple[int, float]], at: int) -> float:
    """The piecewise linear curve through `points` up to the last, flat before the first."""
    if at <= points[0][0]:
        return points[0][1]
    (x0, y0), (x1, y1) = next(pair for pair in pairwise(points) if at <= pair[1][0])
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def fit(curves: Mapping[int, Mapping[int, float]], total: int) -> dict[int, int]:
    """Pick one count from each curve {count: cost}, so that the counts add up to `total` exactly and cost least together."""
    options = [sorted(curve.items()) for curve in curves.values()]
    picked = allocate_curves(options, total, fill=True)
    return {i: curve[index][0] for i, curve, index in zip(curves, options, picked, strict=True)}
