"""Whole-model compressions by MoE-I²: how many experts each layer keeps and which, and then at which ranks their matrices are kept.

Yang et al., EMNLP Findings 2024, arXiv 2411.01016, and what moeflow puts beside each of its decisions. Only graphs are built here.
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
from moeflow.methods.decompose.ranks import average_rank
from moeflow.methods.graph import Calibration, Model
from moeflow.methods.prune import counts as counts_
from moeflow.methods.prune.counts import Counts
from moeflow.methods.prune.searches import Search
from moeflow.methods.prune.steps import block, candidates, counts_exact, counts_paper, importance, importance_lm, pick
from moeflow.step import Step

MEASURED = 16_384
"""Tokens on which alternatives are measured through the whole model: each alternative of each layer keeps their hidden states."""


def prune(calibration: Calibration, counts: Counts, how: Search = Search("swap")) -> Model:
    """The model with fewer experts in its layers, as a graph.

    `counts` says how many experts each layer keeps, `how` by which search its sets are found, and whether blocks of layers choose
    among them together (MoE-I²'s K and T). Raises ValueError for what cannot work, with the nearest that can.
    """
    model = calibration.model
    legal = counts_.legal_counts(model, counts)
    total = counts_.total_experts(model, counts)
    counts_.check_total(total, legal)
    sets = partial(_sets, calibration, counts, how.for_candidates())
    decider, candidates = RULES[counts.rule](calibration, counts, legal, total, sets)
    if how.block > 1:
        return _by_blocks(calibration, decider, candidates, how)
    choices = {i: pick(candidates[i], decider, keep=_known(candidates[i], decider)) for i in legal}
    return model.with_layers(_pruned(calibration, choices), tuple(choices.values()))


class Sets(Protocol):
    """The step that searches a layer's sets for each number of experts in `keep`, or for the one that a step decides."""

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
"""What an expert's importance may be, by name: of (calibration, layers, measured tokens), one step per layer."""


def ratio_left(remove: float, drop: float) -> float:
    """The part of the remaining experts' parameters that has to go where `drop` of the experts went and `remove` of all shall.

    Raises ValueError where dropping alone removes more.
    """
    if not 0 <= drop < 1 or not drop <= remove + 1e-12 or remove >= 1:
        raise ValueError(f"remove={remove} of the experts' parameters must lie between drop={drop}, of the experts, and 1")
    return max(0.0, 1 - (1 - remove) / (1 - drop))


def decompose(
    calibration: Calibration, *, ratio: float = 0.0, ranks: str = "global", rank: int = 0, force: bool = False,
    svd: str = "whitened", importance: str = "lm_loss", alpha: float = 0.15, r_min: int = 1, multiple: int = 1,
    r_max: int = 0, least: int = 1, policy: str = "vanilla", weighted: bool = True, shrink: float = 0.03,
    measured: int = MEASURED,
) -> Model:  # fmt: skip
    """The calibrated model with its experts' matrices as products of two, as a graph; the model itself where `ratio` is 0.

    `ratio`: the part of the experts' parameters that goes; `ranks`: how what stays is spread, a name of `RANKS`; in the place of
    both, `rank` for every matrix, where one above break-even has to be forced; `svd`: "vanilla" (the paper) or "whitened";
    `alpha` and `importance`: the paper's formula; `r_min`, `r_max` (0: break-even) and `multiple`: the least and the largest rank,
    and what ranks are multiples of; an expert that `least` recorded tokens did not reach is cut by its weights ("vanilla") or stays
    whole ("keep"), as `policy` says; `weighted`: a token counts as much as the router gives the expert in it; `shrink`: how much of
    white inputs is mixed into what the tokens say; `measured`: about how many tokens are measured through the whole model. Raises
    ValueError for what cannot work.
    """
    _check(ranks=(ranks, RANKS), importance=(importance, IMPORTANCES))
    decompose_.check(svd, policy, least, multiple, shrink)
    model = calibration.model
    if min(r_min, measured) < 1:
        raise ValueError(f"r_min={r_min} and measured={measured} tokens must be at least 1")
    if ranks == "global" and svd == "vanilla" and ratio:
        raise ValueError("ranks='global' goes by what whitening loses; with svd='vanilla' take ranks='paper' or 'uniform'")
    if ranks == "uniform" and policy == "keep" and ratio:
        raise ValueError(
            "policy='keep' lets the others pay, by ranks that a run decides; take ranks='global', or 'paper' with alpha=0"
        )
    if rank < 0 or (rank and ratio):
        raise ValueError(f"rank={rank} must be at least 0, and stands in the place of ratio={ratio}; give one of them")
    if not ratio and not rank:
        return model
    layers = model.moe_layers
    for i in layers:
        average_rank(ratio, *decompose_.sides(counts_.spec_of(model, i)))
    common: dict[str, Any] = {
        "svd": svd,
        "least": least,
        "policy": policy,
        "weighted": weighted,
        "shrink": shrink,
        "force": force,
        "dtype": calibration.dtype,
    }

    def rewritten(layer: int, decider: tuple[Step, ...], uniform: dict[str, int]) -> Step:
        seen = calibration.observed[layer]
        return decompose_.layer(
            model.essential, model.layers[layer], *decider, *seen, layer=layer, decided=bool(decider), uniform=uniform, **common
        )

    if rank:
        return model.with_layers({i: rewritten(i, (), dict.fromkeys(MATRICES, rank)) for i in layers})
    decider, uniform = RANKS[ranks](
        calibration, rewritten, ratio=ratio, alpha=alpha, r_min=r_min, r_max=r_max, multiple=multiple, least=least, policy=policy,
        weighted=weighted, shrink=shrink, measured=measured, importance=importance,
    )  # fmt: skip
    return model.with_layers({i: rewritten(i, decider, uniform.get(i, {})) for i in layers})


Ranked = tuple[tuple[Step, ...], dict[int, dict[str, int]]]
"""The step that decides the ranks, or the ranks of each layer where they are known when the graph is built."""


def _same_ranks(calibration: Calibration, rewritten: Any, *, ratio: float, multiple: int, r_min: int, **_: Any) -> Ranked:
    found = {}
    for i in calibration.model.moe_layers:
        average = average_rank(ratio, *decompose_.sides(counts_.spec_of(calibration.model, i)))
        rank = max(int(average) // multiple * multiple, 0)
        if rank < max(r_min, 1):
            raise ValueError(
                f"ratio={ratio} leaves rank {average:.4g} in layer {i}, below r_min={r_min} in multiples of {multiple}"
            )
        found[i] = {"gate": rank, "up": rank, "down": rank}
    return (), found


def _ranks_by_importance(
    calibration: Calibration, rewritten: Any,
    *, ratio: float, alpha: float, r_min: int, r_max: int, multiple: int, least: int, policy: str, importance: str, measured: int,
    **_: Any,
) -> Ranked:  # fmt: skip
    model = calibration.model
    seen = IMPORTANCES[importance](calibration, model.moe_layers, measured)
    layers = [{"layer": i, "sides": list(decompose_.sides(counts_.spec_of(model, i)))} for i in seen]
    limits: dict[str, Any] = {"r_min": r_min, "r_max": r_max, "multiple": multiple}
    rule: dict[str, Any] = {"ratio": ratio, "alpha": alpha, "least": least, "policy": policy, **limits}
    return (decompose_.by_importance(*seen.values(), layers=layers, **rule),), {}


def _ranks_by_spectra(
    calibration: Calibration, rewritten: Callable[..., Step],
    *, ratio: float, r_min: int, r_max: int, multiple: int, least: int, policy: str, weighted: bool, shrink: float, measured: int,
    **_: Any,
) -> Ranked:  # fmt: skip
    model, layers = calibration.model, calibration.model.moe_layers
    spectra = [
        decompose_.spectra(
            model.essential, model.layers[i], *calibration.observed[i],
            layer=i, least=least, policy=policy, weighted=weighted, shrink=shrink, dtype=calibration.dtype,
        )
        for i in layers
    ]  # fmt: skip
    alternatives = {}
    for i in layers:
        rank = decompose_.moved_rank(*decompose_.sides(counts_.spec_of(model, i)))
        files = [rewritten(i, (), dict.fromkeys(matrices, rank)) for matrices in decompose_.PARTS.values()]
        alternatives[i] = Alternatives(Forks("files", tuple(decompose_.PARTS)), tuple(files))
    curves = calibrate.curves(calibration, alternatives, tokens=measured)
    rule: dict[str, Any] = {"budget": 1 - ratio, "multiple": multiple, "r_min": r_min, "r_max": r_max}
    return (decompose_.by_spectra(*spectra, curves, layers=layers, **rule),), {}


RANKS: dict[str, Callable[..., Ranked]] = {
    "uniform": _same_ranks,
    "paper": _ranks_by_importance,
    "global": _ranks_by_spectra,
}
"""Every way to spread a budget of parameters over matrices, by name."""


def _by_blocks(calibration: Calibration, decider: Step | None, candidates: Mapping[int, Step], how: Search) -> Model:
    """Choose among every layer's sets block by block (the KT-Reception Field)."""
    model, order = calibration.model, list(candidates)
    choices: dict[int, Step] = {}
    pruned = model
    states, at_layer = calibrate.states_before(calibration, order[0]), order[0]
    behind: tuple[Step, ...] = ()
    for at in range(0, len(order), how.block):
        searched = order[at : at + how.block]
        first, last = searched[0], searched[-1]
        if how.inputs == "original":
            before = calibrate.states_before(calibration, first)
        else:
            before = states = calibrate.advanced(calibration, states, pruned.layers, at_layer, first)
            behind, at_layer = calibrate.states_before(calibration, last + 1), first
        together = block(
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
    """At most `most` of these counts, evenly, with the first and the last."""
    if len(counts) <= most:
        return counts
    if most == 1:
        return [counts[len(counts) // 2]]
    return sorted({counts[ceil(i * (len(counts) - 1) / (most - 1) - 1e-9)] for i in range(most)})


def _check(**given: tuple[str, Any]) -> None:
    for name, (value, known) in given.items():
        if value not in known:
            raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(known)}")
