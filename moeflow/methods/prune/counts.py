"""How many experts each layer keeps, out of one budget for the whole model: the paper's rule, or exactly, from measured curves.

Counts obey the router (top-k, the same number in every group), an optional list of counts that serving kernels accept, and
divisibility by a planned expert-parallel size. No torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal

from moeflow.arch import Family
from moeflow.methods.allocate import allocate_curves
from moeflow.methods.graph import Model
from moeflow.model.spec import LayerSpec

Unit = Literal["experts", "parameters", "bytes"]


def total_experts(model: Model, amount: float, unit: Unit = "experts") -> int:
    """How many experts the whole model may keep when `amount` of `unit` may stay in them; up to 1 it is a part of all there is.

    Raises ValueError for an unknown unit, and where nothing or more than there is would stay.
    """
    if unit not in ("experts", "parameters", "bytes"):
        raise ValueError(f"unit={unit!r} is not known; choose one of experts, parameters, bytes")
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


def legal_counts(
    model: Model, *, counts: Sequence[int] = (), divisor: int = 1, protected: Mapping[int, Sequence[int]] | None = None
) -> dict[int, list[int]]:
    """For every MoE layer the numbers of experts that it may keep, ascending.

    `counts`: those that serving kernels accept (any, where it is empty); `divisor`: the planned expert-parallel size;
    `protected`: per layer the experts that have to stay. Raises ValueError where a layer has none, where `protected` names no
    expert of a layer with experts, and where a step has yet to decide how many experts a layer has.
    """
    family, found = Family.of(model.config), {}
    if divisor < 1:
        raise ValueError(f"divisor={divisor} must be at least 1")
    if strange := sorted(set(protected or {}) - set(model.moe_layers), key=str):
        raise ValueError(f"protected names {strange[0]!r}, which is no layer with experts; those are {model.moe_layers}")
    groups = family.group_limit[0]
    for i in model.moe_layers:
        if spec_of(model, i).share < 1:
            raise ValueError(
                f"how many experts layer {i} has is decided by a step of this graph; run it, pull the result and prune that"
            )
        experts, spared = spec_of(model, i).experts, list((protected or {}).get(i, ()))
        if not all(0 <= e < experts for e in spared):
            raise ValueError(f"protected={spared} of layer {i} must be different experts between 0 and {experts - 1}")
        size = experts // groups
        least = max(sum(g * size <= e < (g + 1) * size for e in spared) for g in range(groups)) * groups
        legal = family.legal_counts(experts)
        found[i] = [n for n in legal if n >= least and n % divisor == 0 and (not counts or n in counts)]
        if not found[i]:
            raise ValueError(
                f"layer {i} can keep {legal[0]} to {legal[-1]} of its {experts} experts, but no such count is among "
                f"{list(counts) or 'all'}, divides by {divisor} and covers {len(spared)} protected experts; loosen one of them"
            )
    return found


def check_total(total: int, legal: Mapping[int, Sequence[int]]) -> None:
    """Raise ValueError, with the nearest totals that can be met, where no legal counts add up to `total`."""
    reachable = 1  # bit n: n experts in all
    for counts in legal.values():
        reachable = sum_of_shifts(reachable, counts)
    if reachable >> total & 1:
        return
    sums = [n for n in range(reachable.bit_length()) if reachable >> n & 1]
    below, above = [n for n in sums if n < total][-1:], [n for n in sums if n > total][:1]
    raise ValueError(f"no legal counts add up to {total} experts; nearest: {' or '.join(map(str, below + above))}")


def sum_of_shifts(bits: int, shifts: Sequence[int]) -> int:
    """The union of `bits` moved up by each of `shifts`."""
    union = 0
    for by in shifts:
        union |= bits << by
    return union


def spec_of(model: Model, layer: int) -> LayerSpec:
    return model.layers[layer].spec.output


def shares(weights: Mapping[int, float], caps: Mapping[int, int], amount: float) -> dict[int, float]:
    """`amount` in proportion to `weights`, none above its cap: what a cap cuts off goes to the others."""
    given = {i: 0.0 for i in weights}
    while amount > 1e-9 and (open_ := [i for i in weights if given[i] < caps[i] - 1e-9]):
        whole, rest = sum(weights[i] for i in open_), amount
        for i in open_:
            more = min(caps[i] - given[i], rest * weights[i] / whole)
            given[i] += more
            amount -= more
    return given


def neighbours(counts: Mapping[int, int], found: Mapping[int, Mapping[int, float]]) -> Iterator[dict[int, int]]:
    """The same total with one layer a legal step lower and another as much higher."""
    for i, n in counts.items():
        lower = [m for m in found[i] if m < n]
        for j in counts:
            up = counts[j] + n - max(lower, default=n)
            if lower and j != i and up in found[j]:
                yield dict(counts) | {i: max(lower), j: up}


def between(points: Sequence[tuple[int, float]], at: int) -> float:
    """The piecewise linear curve through `points`, flat beyond its ends."""
    if at <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return points[-1][1]


def fit(curves: Mapping[int, Mapping[int, float]], total: int) -> dict[int, int]:
    """Of each curve {count: cost} one count, so that they add up to `total` exactly and cost least together."""
    layers = list(curves)
    options = [sorted(curves[i].items()) for i in layers]
    picked = allocate_curves(options, total, fill=True)
    return {i: options[at][index][0] for at, (i, index) in enumerate(zip(layers, picked, strict=True))}
