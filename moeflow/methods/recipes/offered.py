"""What each layer of a fitted model is offered: the alternatives that its engine loads, how each is made, and why others are not.

An alternative is a number of experts, lower ranks, fewer bits, some of these together, or no MoE block.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import Any

from moeflow.arch import Family
from moeflow.methods import rewrite
from moeflow.methods.decompose import steps as decompose
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.fit.options import Alternative, Offers
from moeflow.methods.graph import Calibration, Model
from moeflow.methods.prune.searches import Search
from moeflow.methods.prune.steps import candidates, pick
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.steps import slimmed
from moeflow.methods.trim.steps import gone
from moeflow.step import Step

LEAST_GROUP = 8
"""Fewer weights that share a scale take more bytes than they are worth."""
NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Made:
    """An alternative of a layer: its file, and the same before it was quantized."""

    file: Step
    plain: Step


def on_offer(calibration: Calibration, offers: Offers) -> tuple[Offers, dict[int, dict[Alternative, Made]], dict[str, str]]:
    """The offers as this model and its engine can have them, every MoE layer's alternatives, first the layer as it is, and why
    others are not on offer. Raises ValueError if there are none."""
    model, left = calibration.model, _not_run(offers)
    offers = _grouped(model, _written(model, offers, left), left)
    ratios = _ratios(calibration, offers, left)
    offered = {i: _of_layer(calibration, offers, i, ratios, left) for i in model.moe_layers}
    if not any(len(of_layer) > 1 for of_layer in offered.values()):
        why = "; ".join([_runs(offers), *not_on_offer(left)])
        raise ValueError(f"there is nothing that a layer could become for engine={offers.engine}: {why}")
    return offers, offered, left


def not_on_offer(left: Mapping[str, str]) -> list[str]:
    """What cannot be had, in a line for each kind of reason: the first with its own, and what is left out likewise."""
    kinds: dict[str, list[str]] = {}
    for what, why in left.items():
        kinds.setdefault(NUMBER.sub("", why), []).append(what)
    return [
        f"{first} not on offer: {left[first]}" + (f"; nor, for the like, {'; '.join(others)}" if others else "")
        for first, *others in kinds.values()
    ]


def _of_layer(
    calibration: Calibration, offers: Offers, layer: int, ratios: Sequence[float], left: dict[str, str]
) -> dict[Alternative, Made]:
    """A layer's alternatives as they are made, first the layer as it is; what cannot be had goes to `left`."""
    model, family = calibration.model, Family.of(calibration.model.config)
    runs = replace(offers.runs, model_type=family.arch.model_type)
    own = model.layers[layer]
    experts = own.spec.output.experts
    whole = Alternative(experts)
    made = {whole: Made(own, own)}
    possible = family.legal_counts(experts)
    legal = [n for n in possible if not runs.why_not_count(n)]
    if possible == [experts] and offers.counts:
        left["fewer experts"] = f"the router of layer {layer} gives a token {family.top_k} of its {experts}, and needs them all"
    if why := runs.why_not_width(family.expert_size, offers.group * bool(offers.packs)):
        raise ValueError(f"layer {layer}: {why}")
    if not legal:
        raise ValueError(f"layer {layer}: {runs.why_not_count(experts)}, which a search cannot reach from {experts}")
    counts = sorted({_nearest(part * experts, legal) for part in offers.counts} - {experts})
    made |= _fewer(calibration, offers, layer, counts)
    pruned = {a: one for a, one in made.items() if not runs.why_not_count(a.keep)}
    for alternative, plain in pruned.items():
        for ratio in ratios if offers.grid == "all" or alternative == whole else ():
            made |= _lower(calibration, offers, layer, replace(alternative, ratio=ratio), plain.file, left)
            for b in offers.packs:
                other = replace(alternative, ratio=ratio, bits=b)
                for factored in _lower(calibration, offers, layer, other, plain.file, left).values():
                    made |= _packed(calibration, offers, layer, other, factored.file, left)
    for b in offers.packs:
        for group in offers.groups(b):
            for alternative, plain in pruned.items():
                other = replace(alternative, bits=b, group=group if group != offers.group else 0)
                if why := runs.why_not_width(family.expert_size, group):
                    left.setdefault(other.name, why)
                else:
                    made |= _packed(calibration, offers, layer, other, plain.file, left)
    if offers.gone and runs.gone:
        made |= _allowed(Alternative(0), lambda: gone(model.essential, own, layer=layer), left)
    return made


def _nearest(wanted: float, legal: Sequence[int]) -> int:
    return min(legal, key=lambda n: abs(n - wanted))


def _allowed(
    alternative: Alternative, make: Callable[[], Step], left: dict[str, str], plain: Step | None = None
) -> dict[Alternative, Made]:
    """The alternative, unless this layer or this family cannot have it: then the reason goes to `left`."""
    try:
        file = make()
        return {alternative: Made(file, plain or file)}
    except ValueError as error:
        left.setdefault(alternative.name, str(error))
        return {}


def _fewer(calibration: Calibration, offers: Offers, layer: int, counts: list[int]) -> dict[Alternative, Made]:
    if not counts:
        return {}
    model, how = calibration.model, Search(offers.search).for_candidates()
    sets = candidates(*calibration.of(layer), at=layer, keep=counts, protected=[], how=how, dtype=calibration.dtype)

    def pruned(n: int) -> Made:
        file = rewrite.experts(model.essential, model.layers[layer], pick(sets, keep=n), layer=layer, keep=n)
        return Made(file, file)

    return {Alternative(n): pruned(n) for n in reversed(counts)}


def _lower_ranks(offers: Offers, ratio: float, bits: int = 0) -> Decomposition:
    """How ranks are lowered that take this part of the parameters away, to be packed at so many bits or not (0)."""
    return Decomposition(ratio, multiple=lcm(offers.group or 1, 32 // gcd(32, bits)) if bits else 1)


def _ratios(calibration: Calibration, offers: Offers, left: dict[str, str]) -> Sequence[float]:
    """The parts of the parameters that lower ranks may take; none where the engine or this family has no low-rank experts."""
    if not offers.runs.ranks:
        return ()
    try:
        for i in calibration.model.moe_layers:
            decompose.sides(calibration.model.layers[i].spec.output)
    except ValueError as error:
        left["lower ranks"] = str(error)
        return ()
    return offers.ranks


def _lower(
    calibration: Calibration, offers: Offers, layer: int, alternative: Alternative, whole: Step, left: dict[str, str]
) -> dict[Alternative, Made]:
    """A layer with lower ranks, to be packed at the alternative's bits; `whole`: its file before, with the experts that stay.

    They go to its matrices by what is lost of their outputs, each as costly where all are cut alike. Measuring what a cut of gate
    and up costs beside one of down was another pass and chose no better ranks (LOG.md).
    """
    how, dtype = _lower_ranks(offers, alternative.ratio, alternative.bits), calibration.dtype
    essential, _, observed = calibration.of(layer)

    def factored() -> Step:
        of = essential, whole, observed
        ranks = decompose.by_spectra((decompose.spectra_of(layer, of, how, dtype),), layers=[layer], how=how.of_global_ranks)
        return decompose.factored(layer, of, ranks, {}, how, dtype)

    return _allowed(alternative, factored, left)


def _packed(
    calibration: Calibration, offers: Offers, layer: int, alternative: Alternative, plain: Step, left: dict[str, str]
) -> dict[Alternative, Made]:
    observed, how = calibration.observed[layer], quantized(offers, alternative.bits, alternative.group)

    def packed() -> Step:
        return slimmed(calibration.model.essential, plain, observed, at=layer, how=how, dtype=calibration.dtype)

    return _allowed(alternative, packed, left, plain)


def quantized(offers: Offers, bits: int, group: int = 0) -> Slimming:
    own: dict[str, Any] = {"inputs": "sequential", "target": "expert"}
    return Slimming("gptq", bits=bits, group=group or offers.group, activation_order=True, **own)


def _not_run(offers: Offers) -> dict[str, str]:
    """What is offered and the engine does not run, and where that is known from."""
    runs = offers.runs
    kinds = {f"{b} bits": "bits" for b in offers.bits if b not in runs.bits}
    kinds |= {"lower ranks": "ranks"} if offers.ranks and not runs.ranks else {}
    kinds |= {"a layer without its MoE block": "gone"} if offers.gone and not runs.gone else {}
    return {what: f"{runs.name} does not run it ({runs.sources[kind]})" for what, kind in kinds.items()}


def _written(model: Model, offers: Offers, left: dict[str, str]) -> Offers:
    """The offers of which a checkpoint can be written that the engine loads; what cannot goes to `left`.

    Raises ValueError for a model that has to stay in stacks of experts in MXFP4, which layers that differ cannot.
    """
    runs = offers.runs
    coded = next((i for i in model.moe_layers if model.layers[i].spec.output.mxfp4), None)
    if coded is not None and runs.counts:
        raise ValueError(
            f"layer {coded} is in MXFP4, which is read from stacks of one number of experts only, and engine={offers.engine} lets "
            "layers differ: fit for --engine transformers, which has one number of experts for all, or start from the model in bf16"
        )
    layout = None if model.form is None else model.form.layout
    if layout is None or runs.counts or not layout.stacked or layout.per_expert:
        return offers
    left |= {
        f"{b} bits": f"the family has its experts in stacks, which hold no packed ones, and {runs.name} loads no others"
        for b in offers.packs
    }
    return replace(offers, bits=())


def _grouped(model: Model, offers: Offers, left: dict[str, str]) -> Offers:
    """The offers with a number of weights that share a scale which divides what every expert's matrices take in, if the engine
    reads one of at least `LEAST_GROUP`, or else a scale a row; as they are if it reads neither."""
    columns = gcd(*(n for i in model.moe_layers for n in _columns(model, i)))
    if not (offers.packs and offers.group and columns % offers.group):
        return offers
    known = offers.runs.groups
    fits = [n for n in range(LEAST_GROUP, offers.group) if columns % n == 0 and (known is None or n in known)]
    group = max(fits, default=0)
    if not group and known is not None and 0 not in known:
        return offers
    words = f"groups of {group} are" if group else "one scale a row is"
    left[f"groups of {offers.group}"] = f"they do not divide what the experts' matrices take in; {words} taken"
    return replace(offers, group=group)


def _columns(model: Model, layer: int) -> set[int]:
    """How many inputs the matrices of a layer's experts have."""
    tensors, family = model.layers[layer].spec.output.tensors, Family.of(model.config)
    return {tensors[n][1][-1] for n in family.expert(layer, 0) if n in tensors}


def _runs(offers: Offers) -> str:
    """What the engine runs of what is offered, in a word for each kind."""
    runs: dict[str, Any] = {"counts": offers.counts, "ranks": offers.ranks if offers.runs.ranks else (), "bits": offers.packs}
    return "it runs " + ", ".join(f"{name} {[*values]}" for name, values in runs.items())
