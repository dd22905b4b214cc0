"""Whole-model compressions by MoE-I²: how many experts each layer keeps, and which, and then the ranks of their matrices.

Yang et al., EMNLP Findings 2024, arXiv 2411.01016, and moeflow's alternative to each of its decisions. Only builds graphs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any, Protocol

from moeflow.arch import MATRICES, Family
from moeflow.methods import rewrite
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.calibrate.steps import Alternatives, Forks
from moeflow.methods.decompose import steps as decompose_
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.decompose.ranks import PARTS, average_rank, moved_rank
from moeflow.methods.graph import Calibration, Model, Pass
from moeflow.methods.prune import counts as counts_
from moeflow.methods.prune.counts import Counts
from moeflow.methods.prune.searches import Search
from moeflow.methods.prune.steps import candidates, combinations, counts_exact, counts_paper, importance, importance_lm, pick
from moeflow.step import Step


def prune(calibration: Calibration, counts: Counts, how: Search = Search("swap")) -> Model:
    """Build the graph that drops experts.

    `counts` says how many experts each layer keeps; `how` says which search finds its sets, and whether spans of layers choose
    among them together (MoE-I²'s K and T). Raises ValueError for counts that cannot work, with the nearest that can.
    """
    model = calibration.model
    legal = counts_.legal_counts(model, counts)
    total = counts_.total_experts(model, counts)
    counts_.check_total(total, legal)
    sets = partial(_sets, calibration, counts, how.for_candidates())
    decider, candidates = RULES[counts.rule](calibration, counts, legal, total, sets)
    if how.span > 1:
        return _by_spans(calibration, decider, candidates, how)
    choices = {i: pick(candidates[i], decider, keep=_known(candidates[i], decider)) for i in legal}
    return model.with_layers(_pruned(calibration, choices), tuple(choices.values()))


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


class Sets(Protocol):
    """Make the step that searches a layer's sets for each count in `keep`, or for the one that a step decides."""

    def __call__(self, layer: int, keep: Sequence[int], decider: Step | None = None, *, best: int | None = None) -> Step: ...


def _sets(
    calibration: Calibration, counts: Counts, how: Search, layer: int, keep: Sequence[int], decider: Step | None = None,
    *, best: int | None = None,
) -> Step:  # fmt: skip
    model = calibration.model
    return candidates(
        model.essential, model.layers[layer], calibration.observed[layer], decider,
        at=layer, keep=list(keep), protected=counts.protected_in(layer), how=replace(how, best=best or how.best),
        dtype=calibration.dtype,
    )  # fmt: skip


Searched = tuple[Step | None, dict[int, Step]]
"""The step that decides the counts, if one does, and every layer's candidates."""


def _uniform(calibration: Calibration, counts: Counts, legal: Mapping[int, list[int]], total: int, sets: Sets) -> Searched:
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
    return None, {i: sets(i, [each]) for i in legal}


def _paper(calibration: Calibration, counts: Counts, legal: Mapping[int, list[int]], total: int, sets: Sets) -> Searched:
    importances = IMPORTANCES[counts.importance](calibration, list(legal), counts.measured)
    decider = counts_paper(tuple(importances.values()), **_limits(calibration, legal), total=total)
    return decider, {i: sets(i, legal[i], decider) for i in legal}


def _exact(calibration: Calibration, counts: Counts, legal: Mapping[int, list[int]], total: int, sets: Sets) -> Searched:
    limits = _limits(calibration, legal)
    grids = {i: _thinned([n for n in numbers if n < limits["experts"][str(i)]], counts.grid) for i, numbers in legal.items()}
    alternatives = {i: Alternatives(Forks("sets", tuple(map(str, n))), (sets(i, n, best=1),)) for i, n in grids.items() if n}
    decider = counts_exact(calibrate.curves(calibration, alternatives, tokens=counts.measured), **limits, total=total)
    return decider, {i: sets(i, legal[i], decider) for i in legal}


def _limits(calibration: Calibration, legal: Mapping[int, list[int]]) -> dict[str, Any]:
    experts = {str(i): counts_.spec_of(calibration.model, i).experts for i in legal}
    return {"legal": {str(i): numbers for i, numbers in legal.items()}, "experts": experts}


RULES: dict[str, Callable[[Calibration, Counts, Mapping[int, list[int]], int, Sets], Searched]] = {
    "uniform": _uniform,
    "paper": _paper,
    "exact": _exact,
}
"""The rules of `Counts`, by name."""


def _recon(calibration: Calibration, layers: Sequence[int], measured: int) -> dict[int, Step]:
    model = calibration.model
    return {i: importance(model.essential, model.layers[i], calibration.observed[i], at=i, dtype=calibration.dtype) for i in layers}


def _lm_loss(calibration: Calibration, layers: Sequence[int], measured: int) -> dict[int, Step]:
    model, own = calibration.model, _recon(calibration, layers, measured)
    experts = {i: counts_.spec_of(model, i).experts for i in layers}
    top_k = Family.of(model.config).top_k
    each = {i: Alternatives(Forks("each", tuple(map(str, range(experts[i]))))) for i in layers if experts[i] > top_k}
    curves = calibrate.curves(calibration, each, tokens=measured)
    return {i: importance_lm(curves, own[i]) for i in layers}


IMPORTANCES: dict[str, Callable[[Calibration, Sequence[int], int], dict[int, Step]]] = {"recon": _recon, "lm_loss": _lm_loss}
"""The measures of an expert's importance, by name: functions of (calibration, layers, measured tokens) to one step per layer."""


def ratio_left(remove: float, drop: float) -> float:
    """The fraction of the remaining parameters to remove, if `drop` of the experts are dropped and `remove` of all should go.

    Raises ValueError if dropping alone removes more.
    """
    if not 0 <= drop < 1 or not drop <= remove + 1e-12 or remove >= 1:
        raise ValueError(f"remove={remove} of the experts' parameters must lie between drop={drop}, of the experts, and 1")
    return max(0.0, 1 - (1 - remove) / (1 - drop))


def decompose(calibration: Calibration, how: Decomposition) -> Model:
    """Build the graph that factors each of the experts' matrices into two. Raises ValueError for options that cannot work."""
    _check(importance=(how.importance, IMPORTANCES))
    model, dtype = calibration.model, calibration.dtype
    if not how.ratio and not how.rank:
        return model
    layers = model.moe_layers
    for i in layers:
        average_rank(how.ratio, *decompose_.sides(model.layers[i].spec.output))

    def rewritten(layer: int, ranks: Step | None, uniform: dict[str, int]) -> Step:
        seen = calibration.observed[layer]
        return decompose_.layer(
            model.essential, model.layers[layer], seen, ranks, layer=layer, uniform=uniform, how=how.of_a_layer, dtype=dtype
        )

    if how.rank:
        return model.with_layers({i: rewritten(i, None, dict.fromkeys(MATRICES, how.rank)) for i in layers})
    ranks, uniform = RANKS[how.ranks](calibration, rewritten, how)
    return model.with_layers({i: rewritten(i, ranks, uniform.get(i, {})) for i in layers})


Rewritten = Callable[[int, Step | None, dict[str, int]], Step]
"""Rewrites the layer of this index with the ranks that a step decided, or with the same for all experts."""

Ranked = tuple[Step | None, dict[int, dict[str, int]]]
"""The step that decides the ranks, or each layer's ranks if they are known when the graph is built."""


def _same_ranks(calibration: Calibration, rewritten: Rewritten, how: Decomposition) -> Ranked:
    uniform = {}
    for i in calibration.model.moe_layers:
        average = average_rank(how.ratio, *decompose_.sides(calibration.model.layers[i].spec.output))
        rank = int(average) // how.multiple * how.multiple
        if rank < how.r_min:
            raise ValueError(
                f"ratio={how.ratio} leaves rank {average:.4g} in layer {i}, below r_min={how.r_min} in multiples of {how.multiple}"
            )
        uniform[i] = dict.fromkeys(MATRICES, rank)
    return None, uniform


def _ranks_by_importance(calibration: Calibration, rewritten: Rewritten, how: Decomposition) -> Ranked:
    model = calibration.model
    seen = IMPORTANCES[how.importance](calibration, model.moe_layers, how.measured)
    sides = {str(i): list(decompose_.sides(model.layers[i].spec.output)) for i in seen}
    return decompose_.by_importance(tuple(seen.values()), sides=sides, how=how.of_paper_ranks), {}


def _ranks_by_spectra(calibration: Calibration, rewritten: Rewritten, how: Decomposition) -> Ranked:
    model, layers, dtype = calibration.model, calibration.model.moe_layers, calibration.dtype
    spectra = tuple(
        decompose_.spectra(model.essential, model.layers[i], calibration.observed[i], layer=i, how=how.of_spectra, dtype=dtype)
        for i in layers
    )
    alternatives = {}
    for i in layers:
        rank = moved_rank(*decompose_.sides(model.layers[i].spec.output))
        files = tuple(rewritten(i, None, dict.fromkeys(matrices, rank)) for matrices in PARTS.values())
        alternatives[i] = Alternatives(Forks("files", tuple(PARTS)), files)
    curves = calibrate.curves(calibration, alternatives, tokens=how.measured)
    return decompose_.by_spectra(spectra, curves, layers=layers, how=how.of_global_ranks), {}


RANKS: dict[str, Callable[[Calibration, Rewritten, Decomposition], Ranked]] = {
    "uniform": _same_ranks,
    "paper": _ranks_by_importance,
    "global": _ranks_by_spectra,
}
"""Every way to spread a budget of parameters over matrices, by name."""


def _by_spans(calibration: Calibration, decider: Step | None, candidates: Mapping[int, Step], how: Search) -> Model:
    """Choose among every layer's sets span by span (the KT-Reception Field)."""
    model, order = calibration.model, list(candidates)
    choices: dict[int, Step] = {}
    pruned = model
    states, at_layer = calibrate.states_before(calibration, order[0]), order[0]
    behind: tuple[Step, ...] = ()
    for at in range(0, len(order), how.span):
        searched = order[at : at + how.span]
        first, last = searched[0], searched[-1]
        if how.inputs == "original":
            before = calibrate.states_before(calibration, first)
        else:
            before = states = calibrate.advanced(calibration, states, pruned.layers, at_layer, first)
            behind, at_layer = calibrate.states_before(calibration, last + 1), first
        together = combinations(
            model.essential, model.layers[first : last + 1], tuple(candidates[i] for i in searched), before, behind,
            first=first, best=how.best, batch=calibration.batch, dtype=calibration.dtype,
        )  # fmt: skip
        made = {i: pick(candidates[i], decider, together, keep=_known(candidates[i], decider)) for i in searched}
        choices |= made
        pruned = pruned.with_layers(_pruned(calibration, made))
    return pruned.with_layers({}, tuple(choices.values()))


def _pruned(calibration: Calibration, choices: Mapping[int, Step]) -> dict[int, Step]:
    model = calibration.model
    return {
        i: rewrite.experts(model.essential, model.layers[i], choice, layer=i, keep=choice.spec.output["keep"])
        for i, choice in choices.items()
    }


def _known(candidates: Step, decider: Step | None) -> int | None:
    """How many experts the layer keeps, unless a step decides it."""
    return int(candidates.spec.output["counts"][0]) if decider is None else None


def _thinned(counts: list[int], most: int) -> list[int]:
    """At most `most` of these counts, evenly spaced, with the first and the last."""
    if len(counts) <= most:
        return counts
    if most == 1:
        return [counts[len(counts) // 2]]
    return sorted({counts[ceil(i * (len(counts) - 1) / (most - 1) - 1e-9)] for i in range(most)})


def _check(**given: tuple[str, Any]) -> None:
    for name, (value, known) in given.items():
        if value not in known:
            raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(known)}")
