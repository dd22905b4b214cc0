"""Whole-model compressions by MoE-I²: how many experts each layer keeps and which, and then at which ranks their matrices are kept.

Yang et al., EMNLP Findings 2024, arXiv 2411.01016, and what moeflow puts beside each of its decisions. Only graphs are built here.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

from moeflow.arch import MATRICES, Family
from moeflow.methods import rewrite
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.calibrate.steps import Alternatives, Forks
from moeflow.methods.decompose import steps as decompose_
from moeflow.methods.decompose.options import MEASURED, Decomposition
from moeflow.methods.decompose.ranks import PARTS, average_rank, moved_rank
from moeflow.methods.graph import Calibration, Model
from moeflow.methods.prune import counts as counts_
from moeflow.methods.prune import steps as prune_
from moeflow.methods.prune.steps import candidates, importance
from moeflow.methods.prune.subsets import GENERATIONS, POPULATION, STARTS
from moeflow.step import Step


def prune(
    calibration: Calibration, *, keep: float, unit: counts_.Unit = "experts",
    counts: str = "exact", search: str = "swap", importance: str = "lm_loss",
    best: int = 3, block: int = 1, inputs: str = "original",
    legal: Sequence[int] = (), divisor: int = 1, protected: Mapping[int, Sequence[int]] | None = None,
    grid: int = 8, measured: int = MEASURED,
    population: int = POPULATION, generations: int = GENERATIONS, starts: int = STARTS, seed: int = 0,
) -> Model:  # fmt: skip
    """The model with fewer experts in its layers, as a graph.

    `keep` of `unit` stays: a part of all up to 1, an amount above it. `counts`: how the budget is spread over layers, a name of
    `COUNTS`; `search`: how a layer's set is found ("genetic" with its `population` and `generations`, "swap" with its `starts`,
    "enumerate"); `importance`: "recon" or "lm_loss", what the paper's counts go by; `best`: the sets kept of each layer, of which
    blocks of `block` layers choose together (MoE-I²'s K and T; T=1: the layer's best), on `inputs` "original" or "progressive".
    `legal`, `divisor` and `protected` are as in `budget.legal_counts`; the exact rule measures at most `grid` counts a layer;
    what is measured through the whole model is measured on about `measured` of the calibration tokens. Raises ValueError for what
    cannot work, with the nearest that can.
    """
    _check(counts=(counts, COUNTS), importance=(importance, IMPORTANCES), inputs=(inputs, prune_.INPUTS))
    if min(best, block) < 1:
        raise ValueError(f"best={best} sets (K) and block={block} layers (T) must be at least 1")
    if inputs == "progressive" and block == 1:
        raise ValueError("inputs='progressive' is for blocks that choose together; give block=2 or more")
    model = calibration.model
    allowed = counts_.legal_counts(model, counts=legal, divisor=divisor, protected=protected)
    total = counts_.total_experts(model, keep, unit)
    counts_.check_total(total, allowed)
    options = {"genetic": {"population": population, "generations": generations}, "swap": {"starts": starts}}.get(search, {})
    common: dict[str, Any] = {"method": search, "options": options, "seed": seed, "dtype": calibration.dtype}
    spare = {i: list((protected or {}).get(i, ())) for i in allowed}

    def sets(layer: int, wanted: Sequence[int], decider: tuple[Step, ...] = (), most: int = best) -> Step:
        return candidates(
            model.essential, model.layers[layer], *decider, *calibration.observed[layer],
            layer=layer, counts=list(wanted), decided=bool(decider), best=most, protected=spare[layer], **common,
        )  # fmt: skip

    decider, found = COUNTS[counts](calibration, allowed, total, sets, importance=importance, grid=grid, measured=measured)
    if block == 1:
        choices = {i: prune_.pick(found[i], *decider, layer=i, keep=_fixed(found[i], decider)) for i in allowed}
        return model.with_layers(_dropped(calibration, choices), tuple(choices.values()))
    return _by_blocks(calibration, found, decider, best=best, block=block, inputs=inputs)


Found = tuple[tuple[Step, ...], dict[int, Step]]
"""The step that decides the counts, if one does, and every layer's candidates."""


def _uniform(calibration: Calibration, legal: Mapping[int, list[int]], total: int, sets: Callable[..., Step], **_: Any) -> Found:
    each, left = divmod(total, len(legal))
    if left or any(each not in counts for counts in legal.values()):
        shared = sorted(set.intersection(*map(set, legal.values())))
        if not shared:
            raise ValueError(f"no number of experts is legal in each of {len(legal)} layers; take counts='exact' or 'paper'")
        nearest = sorted(shared, key=lambda n: (abs(n * len(legal) - total), n))[:2]
        raise ValueError(
            f"{total} experts are not the same legal number in each of {len(legal)} layers; nearest: "
            f"{' or '.join(str(n * len(legal)) for n in sorted(nearest))}"
        )
    return (), {i: sets(i, [each]) for i in legal}


def _paper(
    calibration: Calibration, legal: Mapping[int, list[int]], total: int, sets: Callable[..., Step],
    *, importance: str, measured: int, **_: Any,
) -> Found:  # fmt: skip
    seen = IMPORTANCES[importance](calibration, list(legal), measured)
    decider = prune_.counts_paper(*seen.values(), **_rule(calibration, legal), total=total)
    return (decider,), {i: sets(i, legal[i], (decider,)) for i in legal}


def _exact(
    calibration: Calibration, legal: Mapping[int, list[int]], total: int, sets: Callable[..., Step],
    *, grid: int, measured: int, **_: Any,
) -> Found:  # fmt: skip
    if grid < 2 or measured < 1:
        raise ValueError(f"grid={grid} counts must be at least 2, a curve's two ends, and measured={measured} tokens at least 1")
    rule = _rule(calibration, legal)
    grids = {i: _thinned([n for n in counts if n < rule["experts"][str(i)]], grid) for i, counts in legal.items()}
    alternatives = {
        i: Alternatives(Forks("sets", tuple(map(str, counts))), (sets(i, counts, (), 1),)) for i, counts in grids.items() if counts
    }
    decider = prune_.counts_exact(calibrate.curves(calibration, alternatives, tokens=measured), **rule, total=total)
    return (decider,), {i: sets(i, legal[i], (decider,)) for i in legal}


def _rule(calibration: Calibration, legal: Mapping[int, list[int]]) -> dict[str, Any]:
    experts = {str(i): counts_.spec_of(calibration.model, i).experts for i in legal}
    return {"legal": {str(i): counts for i, counts in legal.items()}, "experts": experts}


COUNTS: dict[str, Callable[..., Found]] = {"uniform": _uniform, "paper": _paper, "exact": _exact}
"""Every way to spread a budget of experts over layers, by name."""


def _recon(calibration: Calibration, layers: Sequence[int], measured: int) -> dict[int, Step]:
    model = calibration.model
    return {
        i: importance(model.essential, model.layers[i], *calibration.observed[i], layer=i, dtype=calibration.dtype) for i in layers
    }


def _lm_loss(calibration: Calibration, layers: Sequence[int], measured: int) -> dict[int, Step]:
    model, own = calibration.model, _recon(calibration, layers, measured)
    experts = {i: counts_.spec_of(model, i).experts for i in layers}
    top_k = Family.of(model.config).top_k
    each = {i: Alternatives(Forks("each", tuple(map(str, range(experts[i]))))) for i in layers if experts[i] > top_k}
    curves = calibrate.curves(calibration, each, tokens=measured)
    return {i: prune_.importance_lm(curves, own[i], layer=i) for i in layers}


IMPORTANCES: dict[str, Callable[[Calibration, Sequence[int], int], dict[int, Step]]] = {"recon": _recon, "lm_loss": _lm_loss}
"""Every reading of an expert's importance, by name: one step per layer."""


def ratio_left(remove: float, drop: float) -> float:
    """The part of the remaining experts' parameters that has to go where `drop` of the experts went and `remove` of all shall.

    Raises ValueError where dropping alone removes more.
    """
    if not 0 <= drop < 1 or not drop <= remove + 1e-12 or remove >= 1:
        raise ValueError(f"remove={remove} of the experts' parameters must lie between drop={drop}, of the experts, and 1")
    return max(0.0, 1 - (1 - remove) / (1 - drop))


def decompose(calibration: Calibration, how: Decomposition) -> Model:
    """The calibrated model with its experts' matrices as products of two, as a graph. Raises ValueError for what cannot work."""
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
"""A layer of this number with ranks that a step decided, or that are the same for all experts."""

Ranked = tuple[Step | None, dict[int, dict[str, int]]]
"""The step that decides the ranks, or the ranks of each layer where they are known when the graph is built."""


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


def _by_blocks(
    calibration: Calibration, found: Mapping[int, Step], decider: tuple[Step, ...],
    *, best: int, block: int, inputs: str,
) -> Model:  # fmt: skip
    """Choose among every layer's sets block by block: the KT-Reception Field."""
    model, order = calibration.model, list(found)
    choices: dict[int, Step] = {}
    changed = model
    states, at_layer = calibrate.states_before(calibration, order[0]), order[0]
    goals: tuple[Step, ...] = ()
    for at in range(0, len(order), block):
        searched = order[at : at + block]
        layers = list(range(searched[0], searched[-1] + 1))
        if inputs == "original":
            before = calibrate.states_before(calibration, layers[0])
        else:
            before = states = calibrate.advanced(calibration, states, changed.layers, at_layer, layers[0])
            goals, at_layer = calibrate.states_before(calibration, layers[-1] + 1), layers[0]
        chosen = prune_.block(
            model.essential, *(model.layers[i] for i in layers), *(found[i] for i in searched), *before, *goals,
            layers=layers, searched=searched, best=best, shards=len(before), goals=len(goals),
            batch=calibration.batch, dtype=calibration.dtype,
        )  # fmt: skip
        made = {i: prune_.pick(found[i], *decider, chosen, layer=i, keep=_fixed(found[i], decider)) for i in searched}
        choices |= made
        changed = changed.with_layers(_dropped(calibration, made))
    return changed.with_layers({}, tuple(choices.values()))


def _dropped(calibration: Calibration, choices: Mapping[int, Step]) -> dict[int, Step]:
    model = calibration.model
    return {
        i: rewrite.experts(model.essential, model.layers[i], choice, layer=i, keep=choice.spec.output["keep"])
        for i, choice in choices.items()
    }


def _fixed(found: Step, decider: tuple[Step, ...]) -> int:
    """How many experts the layer keeps, where the graph knows it; 0 where a step decides."""
    return 0 if decider else int(found.spec.output["counts"][0])


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
