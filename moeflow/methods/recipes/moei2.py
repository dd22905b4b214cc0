"""Whole-model compressions by MoE-I²: how many experts each layer keeps, and which, and then the ranks of their matrices.

Yang et al., EMNLP Findings 2024, arXiv 2411.01016, and moeflow's alternative to each of its decisions. Only builds graphs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import ceil
from typing import Any

from moeflow.arch import MATRICES, Family
from moeflow.methods import rewrite
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.calibrate.chains import Alternatives, Forks, rows_of
from moeflow.methods.decompose import steps as decompose_
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.decompose.ranks import PARTS, average_rank, moved_rank
from moeflow.methods.graph import HIDDEN, Calibration, Model, Pass
from moeflow.methods.predict.steps import predicted
from moeflow.methods.prune import counts as counts_
from moeflow.methods.prune.counts import Counts
from moeflow.methods.prune.searches import Search
from moeflow.methods.prune.steps import (
    candidates,
    combinations,
    combinations_of_shard,
    counts_exact,
    counts_paper,
    importance,
    importance_measured,
    pick,
)
from moeflow.step import Step


def prune(calibration: Calibration, counts: Counts, how: Search = Search("swap")) -> Model:
    """Build the graph that drops experts.

    `counts` says how many experts each layer keeps; `how` says which search finds its sets, and whether spans of layers choose
    among them together (MoE-I²'s K and T). Prediction layers that are to be pruned keep as many as the layer that keeps most, by
    the same search. Raises ValueError for counts that cannot work, with the nearest that can.
    """
    calibration.check_states(f"counts.rule={counts.rule} with search={how.method}")
    calibration = predicted(calibration)
    model = calibration.model
    legal, total = counts_.legal_counts(model, counts), counts_.total_experts(model, counts)
    counts_.check_total(total, legal)
    budget = Budget(calibration, counts, how.for_candidates(), legal, total)
    decider, candidates = RULES[counts.rule](budget)
    behind = {i: budget.sets(i, budget.most(candidates, decider), decider) for i in calibration.predicted}
    if how.span > 1:
        pruned = _by_spans(calibration, decider, candidates, how)
    else:
        pruned = rewrite.pruned(model, _picked(candidates, decider))
    return rewrite.pruned(pruned, _picked(behind, decider))


def compress(
    model: Model, tokens: Step, passed: Pass, *, counts: Counts, search: Search, removed: float, decomposition: Decomposition
) -> Model:
    """Build the graph that prunes the model, and decomposes the rest until `removed` of the experts' parameters are gone.

    The ratio of `decomposition` follows from that. Raises ValueError for options that cannot work.
    """
    pruned = prune(calibrate.run(model, tokens, passed), counts, search)
    kept = counts.keep
    if kept > 1:
        kept = counts_.total_experts(model, counts) / sum(counts_.spec_of(model, i).experts for i in model.moe_layers)
    how = replace(decomposition, ratio=ratio_left(removed, 1 - kept))
    return decompose(calibrate.run(pruned, tokens, passed), how)


Searched = tuple[Step | None, dict[int, Step]]
"""The step that decides the counts, if one does, and every layer's candidates."""


@dataclass(frozen=True)
class Budget:
    """How many experts of a calibrated model stay in all, and how the sets of each layer are searched."""

    calibration: Calibration
    counts: Counts
    how: Search
    legal: Mapping[int, list[int]]
    """The numbers of experts that each layer may keep."""
    total: int

    def sets(self, layer: int, keep: list[int], decider: Step | None = None, *, best: int | None = None) -> Step:
        """The step that searches a layer's sets for each count in `keep`, or for the one that a step decides."""
        how, protected = replace(self.how, best=best or self.how.best), self.counts.protected_in(layer)
        dtype = self.calibration.dtype
        return candidates(*self.calibration.of(layer), decider, at=layer, keep=keep, protected=protected, how=how, dtype=dtype)

    def most(self, candidates: Mapping[int, Step], decider: Step | None) -> list[int]:
        """The numbers of experts that the layer which keeps most may have."""
        counts = {n for i in candidates for n in candidates[i].spec.output["counts"]}
        return sorted(counts) if decider else [max(counts)]

    def searched(self, decider: Step) -> Searched:
        return decider, {i: self.sets(i, numbers, decider) for i, numbers in self.legal.items()}

    @property
    def experts(self) -> dict[int, int]:
        return {i: counts_.spec_of(self.calibration.model, i).experts for i in self.legal}

    @property
    def limits(self) -> dict[str, Any]:
        """The parameters of the steps that decide counts."""
        legal, experts = ({str(i): value for i, value in of.items()} for of in (self.legal, self.experts))
        return {"legal": legal, "experts": experts, "total": self.total}


def _uniform(budget: Budget) -> Searched:
    legal, total = budget.legal, budget.total
    each, left = divmod(total, len(legal))
    if left or any(each not in numbers for numbers in legal.values()):
        shared = sorted(set.intersection(*map(set, legal.values())))
        if not shared:
            raise ValueError(f"no number of experts is legal in each of {len(legal)} layers; take rule='exact' or 'paper'")
        nearest = sorted(shared, key=lambda n: (abs(n * len(legal) - total), n))[:2]
        raise ValueError(
            f"{total} experts are not the same legal number in each of {len(legal)} layers; nearest: "
            f"{' or '.join(str(n * len(legal)) for n in sorted(nearest))}"
        )
    return None, {i: budget.sets(i, [each]) for i in legal}


def _paper(budget: Budget) -> Searched:
    importances = importance_by(budget.counts, budget.calibration, list(budget.legal))
    return budget.searched(counts_paper(tuple(importances.values()), **budget.limits))


def _exact(budget: Budget) -> Searched:
    counts, experts = budget.counts, budget.experts
    grids = {i: _thinned([n for n in numbers if n < experts[i]], counts.grid) for i, numbers in budget.legal.items()}
    alternatives = {i: Alternatives(Forks("sets", tuple(map(str, n))), (budget.sets(i, n, best=1),)) for i, n in grids.items() if n}
    curves = calibrate.curves(budget.calibration, alternatives, tokens=counts.measured)
    return budget.searched(counts_exact(curves, **budget.limits))


RULES: dict[str, Callable[[Budget], Searched]] = {"uniform": _uniform, "paper": _paper, "exact": _exact}
"""The rules of `Counts`, by name."""


def importance_by(how: Counts | Decomposition, calibration: Calibration, layers: Sequence[int]) -> dict[int, Step]:
    """The importance of the experts of these layers, by the measure that `how` names."""
    own = {i: importance(*calibration.of(i), at=i, dtype=calibration.dtype) for i in layers}
    if how.importance == "recon":
        return own
    family, each = Family.of(calibration.model.config), {}
    for i in layers:
        experts = counts_.spec_of(calibration.model, i).experts
        if (most := _spared(family, experts)) > 0:
            each[i] = Alternatives(Forks("each", _left_out(experts, min(how.together, most))))
    curves = calibrate.curves(calibration, each, tokens=how.measured)
    return {i: importance_measured(curves, own[i], by=how.importance) for i in layers}


def _spared(family: Family, experts: int) -> int:
    """How many experts of a layer may be missing, whichever they are, while every token still gets its top k."""
    groups, topk_groups = family.group_limit
    if groups == 1:
        return experts - family.top_k
    least = 2 if family.arch.group_score == "top2" else 1
    return experts // groups - max(least, ceil(family.top_k / topk_groups))


def _left_out(experts: int, together: int) -> tuple[str, ...]:
    """The names of alternatives that leave out every expert once, `together` at a time, and no neighbours together."""
    count = -(-experts // together)
    return tuple("+".join(map(str, range(n, experts, count))) for n in range(count))


def ratio_left(remove: float, drop: float) -> float:
    """The fraction of the remaining parameters to remove, if `drop` of the experts are dropped and `remove` of all should go.

    Raises ValueError if dropping alone removes more.
    """
    if not 0 <= drop < 1 or not drop <= remove + 1e-12 or remove >= 1:
        raise ValueError(f"remove={remove} of the experts' parameters must lie between drop={drop}, of the experts, and 1")
    return max(0.0, 1 - (1 - remove) / (1 - drop))


def decompose(calibration: Calibration, how: Decomposition) -> Model:
    """Build the graph that factors each of the experts' matrices into two. Raises ValueError for options that cannot work."""
    model = calibration.model
    if not how.ratio and not how.rank:
        return model
    calibration.check_states("decomposition")
    sides = {i: decompose_.sides(model.layers[i].spec.output) for i in model.moe_layers}
    for of_layer in sides.values():
        average_rank(how.ratio, *of_layer)  # refuses a ratio that cannot be
    if how.rank:
        same = dict.fromkeys(MATRICES, how.rank)
        return model.with_layers({i: _factored(calibration, how, i, None, same) for i in sides})
    ranks, uniform = RANKS[how.ranks](calibration, how, sides)
    return model.with_layers({i: _factored(calibration, how, i, ranks, uniform.get(i, {})) for i in sides})


def _factored(calibration: Calibration, how: Decomposition, layer: int, ranks: Step | None, uniform: dict[str, int]) -> Step:
    """The step that factors a layer's matrices, to the ranks that a step decided, or to the same for all experts."""
    return decompose_.factored(layer, calibration.of(layer), ranks, uniform, how, calibration.dtype)


Sides = Mapping[int, tuple[int, int]]
"""By layer, the expert width F and the model width D."""

Ranked = tuple[Step | None, dict[int, dict[str, int]]]
"""The step that decides the ranks, or each layer's ranks if they are known when the graph is built."""


def _same_ranks(calibration: Calibration, how: Decomposition, sides: Sides) -> Ranked:
    uniform = {}
    for i, of_layer in sides.items():
        average = average_rank(how.ratio, *of_layer)
        rank = int(average) // how.multiple * how.multiple
        if rank < how.r_min:
            raise ValueError(
                f"ratio={how.ratio} leaves rank {average:.4g} in layer {i}, below r_min={how.r_min} in multiples of {how.multiple}"
            )
        uniform[i] = dict.fromkeys(MATRICES, rank)
    return None, uniform


def _ranks_by_importance(calibration: Calibration, how: Decomposition, sides: Sides) -> Ranked:
    importances = importance_by(how, calibration, list(sides))
    lists = {str(i): list(of_layer) for i, of_layer in sides.items()}
    return decompose_.by_importance(tuple(importances.values()), sides=lists, how=how.of_paper_ranks), {}


def _ranks_by_spectra(calibration: Calibration, how: Decomposition, sides: Sides) -> Ranked:
    spectra = tuple(decompose_.spectra_of(i, calibration.of(i), how, calibration.dtype) for i in sides)
    alternatives = {}
    for i, of_layer in sides.items():
        cut = (dict.fromkeys(matrices, moved_rank(*of_layer)) for matrices in PARTS.values())
        alternatives[i] = Alternatives(Forks("files", tuple(PARTS)), tuple(_factored(calibration, how, i, None, c) for c in cut))
    curves = calibrate.curves(calibration, alternatives, tokens=how.measured)
    return decompose_.by_spectra(spectra, curves, layers=list(sides), how=how.of_global_ranks), {}


RANKS: dict[str, Callable[[Calibration, Decomposition, Sides], Ranked]] = {
    "uniform": _same_ranks,
    "paper": _ranks_by_importance,
    "global": _ranks_by_spectra,
}
"""Every way to spread a budget of parameters over matrices, by name."""


def _by_spans(calibration: Calibration, decider: Step | None, candidates: Mapping[int, Step], how: Search) -> Model:
    """Choose among every layer's sets span by span (the KT-Reception Field)."""
    calibration = _sampled(calibration, how.measured) if how.measured else calibration
    order, pruned = list(candidates), calibration.model
    states, at_layer = calibrate.states_before(calibration, order[0]), order[0]
    original = calibration.model.layers
    behind: tuple[Step, ...] = ()
    for at in range(0, len(order), how.span):
        searched = {i: candidates[i] for i in order[at : at + how.span]}
        first, last = min(searched), max(searched)
        if how.inputs == "original" and any(at_layer < i <= first for i in calibration.states):
            states, at_layer = calibrate.states_before(calibration, first), first
        layers = original if how.inputs == "original" else pruned.layers
        before = states = calibrate.advanced(calibration, states, layers, at_layer, first)
        at_layer = first
        if how.inputs == "progressive":
            behind = calibrate.states_before(calibration, last + 1)
        same: dict[str, Any] = {"first": first, "best": how.best, "dtype": calibration.dtype}
        span = pruned.essential, pruned.layers[first : last + 1], tuple(searched.values())
        shards = zip_longest(before, behind)
        each = (calibration.passed.bounded(combinations_of_shard(*span, *shard, **same)) for shard in shards)
        together = combinations(tuple(each))
        pruned = rewrite.pruned(pruned, _picked(searched, decider, together))
    return pruned


def _sampled(calibration: Calibration, tokens: int) -> Calibration:
    """The calibration with the hidden states of about `tokens` tokens only, equally many from every shard, as one shard."""
    rows = rows_of(calibration, tokens)
    if sum(n for _, n in rows) == calibration.tokens.spec.output.sequences:
        return calibration

    def first(states: tuple[Step, ...]) -> tuple[Step, ...]:
        return (calibrate.start(tuple(s.part(HIDDEN) for s in states), taken=[n for _, n in rows]),)

    states = {i: first(of_stage) for i, of_stage in calibration.states.items()}
    return replace(calibration, starts=first(calibration.starts), ends=first(calibration.ends), states=states)


def _picked(candidates: Mapping[int, Step], decider: Step | None, together: Step | None = None) -> dict[int, Step]:
    """Each layer's choice among its candidates: the best, or the one in the best combination of its span."""
    known = {i: None if decider else sets.spec.output["counts"][0] for i, sets in candidates.items()}
    return {i: pick(sets, decider, together, keep=known[i]) for i, sets in candidates.items()}


def _thinned(counts: list[int], most: int) -> list[int]:
    """At most `most` of these counts, evenly spaced, with the first and the last."""
    if len(counts) <= most:
        return counts
    if most == 1:
        return [counts[len(counts) // 2]]
    return sorted({counts[ceil(i * (len(counts) - 1) / (most - 1) - 1e-9)] for i in range(most)})
