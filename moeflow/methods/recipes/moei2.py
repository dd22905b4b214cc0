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
from moeflow.methods.decompose.ranks import average_rank
from moeflow.methods.graph import Calibration, Model
from moeflow.methods.prune import counts as counts_
from moeflow.methods.prune import steps as prune_
from moeflow.methods.prune.steps import candidates, importance
from moeflow.methods.prune.subsets import GENERATIONS, POPULATION, STARTS
from moeflow.step import Step

MEASURED = 16_384
"""Tokens on which alternatives are measured through the whole model: each alternative of each layer keeps their hidden states."""


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
