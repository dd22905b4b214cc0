"""One budget for a whole model: every layer is offered alternatives, and the combination that moves the model least is built.

An alternative is a number of experts, lower ranks, fewer bits, some of these together, or no MoE block. Each is measured alone, as
the divergence of the whole model's predictions; under one budget the best combination is a multiple-choice knapsack, solved
exactly. Costs add up only nearly, so a second round measures the most promising ones again around the first choice, or, for an
engine that runs layers of one kind only, the most promising models whole.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm
from typing import Any

from moeflow.arch import Family
from moeflow.methods import rewrite
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.calibrate.chains import Alternatives, Forks
from moeflow.methods.checkpoint.export import written
from moeflow.methods.decompose import steps as decompose
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.fit import steps as fit
from moeflow.methods.fit.choosing import LISTED, RANKED
from moeflow.methods.fit.options import Alternative, Budget, Offers
from moeflow.methods.fit.recovering import KEPT, MERGED
from moeflow.methods.graph import Calibration, Model, Pass
from moeflow.methods.prune.searches import Search
from moeflow.methods.prune.steps import candidates, pick
from moeflow.methods.recipes.sequence import in_sequence
from moeflow.methods.recipes.tune import Tuned
from moeflow.methods.records import Shortlist
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.steps import slimmed, slimmed_as_decided, unpacked
from moeflow.methods.trim.steps import gone
from moeflow.step import Part, Step

LEAST_GROUP = 8
"""Fewer weights that share a scale take more bytes than they are worth."""
NUMBER = re.compile(r"\d+(\.\d+)?")
SHARD = 16_384
"""Tokens of a shard where layers are quantized in sequence: each waits for the one before, and more GPUs share a wait then."""


@dataclass(frozen=True)
class Made:
    """An alternative of a layer: its file, and the same before it was quantized."""

    file: Step
    plain: Step


@dataclass(frozen=True)
class Fitting:
    """The fitted model, the steps that report on it, and one that reports what every budget would cost, before any is chosen."""

    model: Model
    reports: tuple[Step, ...]
    frontier: Step


def calibrated(model: Model, tokens: Step, passed: Pass, **also: bool) -> Calibration:
    """Calibrate the model as a fit wants it: with what every MoE block's output is added to."""
    return calibrate.run(model, tokens, passed, beside=_smaller(passed, tokens), **also)


def compress(calibration: Calibration, budget: Budget, offers: Offers, recover: Callable[[Model], Tuned] | None = None) -> Fitting:
    """Build the graph that fits the model, which `calibrated` ran, into the budget. Raises ValueError if nothing can be had.

    `recover` fine-tunes the chosen model. Factors that it leaves beside packed weights are kept, where engine and budget allow it,
    or merged by packing again, whichever loses less.
    """
    calibration.check_states("fit")
    model = calibration.model
    left = _not_run(offers)
    offers = _grouped(model, _written(model, offers, left), left)
    ratios = _ratios(calibration, offers, left)
    offered = {i: _of_layer(calibration, offers, i, ratios, left) for i in model.moe_layers}
    if not any(len(of_layer) > 1 for of_layer in offered.values()):
        why = "; ".join([_runs(offers), *_not_on_offer(left)])
        raise ValueError(f"there is nothing that a layer could become for engine={offers.engine}: {why}")
    offer = {str(i): [*of_layer] for i, of_layer in offered.items()}
    files = tuple(tuple(made.file for made in of_layer.values()) for of_layer in offered.values())
    fixed = [layer for i, layer in enumerate(model.layers) if i not in offered]
    beside = [] if model.form is None or model.form.beside is None else [model.form.beside]

    def measured(around: Step | None, alternatives: bool = True) -> Step:
        """What the alternatives cost around the original, or those that a choice finds promising around that."""
        of = {i: _forks(of_layer, around) for i, of_layer in offered.items()} if alternatives else {}
        if around is None:
            return calibrate.curves(calibration, of, tokens=offers.measured)
        listed = around.part(Shortlist.FILE)
        return calibrate.curves(calibration, of, tokens=offers.measured, around=built(around), shortlist=listed, listed=LISTED)

    def chosen(curves: Step, before: Step | None = None, place: int = 0) -> Step:
        return fit.decide(
            model.rest, curves, (*fixed, *beside), files, before,
            offer=offer, budget=budget, engine=offers.runs.word, place=place,
        )  # fmt: skip

    def built(choice: Step, *, packed: bool = True) -> Model:
        def layer(i: int, of_layer: dict[Alternative, Made]) -> Step:
            made = tuple(m.file if packed else m.plain for m in of_layer.values())
            return fit.layer(choice, made, layer=i, offer=offer[str(i)], engine=offers.runs.word)

        return model.with_layers({i: layer(i, of_layer) for i, of_layer in offered.items()})

    try:
        choices = [chosen(measured(None))]
    except ValueError as error:
        raise ValueError("; ".join([str(error), *_not_on_offer(left)])) from None
    if beside and model.form is not None and not written(built(choices[0]), model.form).as_source:
        beside.clear()  # what is written is the text model alone
        choices = [chosen(measured(None))]
    alike = not offers.runs.counts  # layers are of one kind, so that nothing can be moved in one of them
    if alike and offers.rounds > 1:
        choices += [chosen(measured(None), place=n) for n in range(1, RANKED)]
    elif offers.rounds > 1:
        choices.append(chosen(measured(choices[0]), choices[0]))
    best = fit.better(tuple(choices), tuple(measured(c, alternatives=False) for c in choices))
    last = best if alike else choices[-1]
    plain = built(last, packed=False)
    again, ends = _in_sequence(calibration, plain, fit.bits(last, offer=offer), offers, left)
    made = built(best)
    if again is not None and again is not plain:
        best = fit.nearer(best, last, _apart(calibration, offers, again, ends))
        made = _either(best, made, again)
    reports: tuple[Step, ...] = ()
    if recover is not None:
        best, made, reports = _recovered(calibration, offers, best, made, recover(made), fit.bits(best, offer=offer), left)
    told = fit.report(best).noting(*_not_on_offer(left))
    return Fitting(replace(made, choices=(*model.choices, best)), (told, *reports), fit.report(choices[0]))


def _apart(calibration: Calibration, offers: Offers, model: Model, ends: tuple[Step, ...] = ()) -> Step:
    """How far a model is from the original; `ends`: its states behind the last layer, if they are known."""
    return calibrate.curves(calibration, {}, tokens=offers.measured, around=model, ends=ends)


def _recovered(
    calibration: Calibration, offers: Offers, best: Step, made: Model, tuned: Tuned, bits: Step, left: dict[str, str]
) -> tuple[Step, Model, tuple[Step, ...]]:
    """The choice, its model fine-tuned, if that is closer to the original, and the reports on that.

    Factors beside packed weights are kept there, or merged: the sums are packed again.
    """
    beside = [i for i in made.moe_layers if tuned.model.layers[i].spec.output.format.added]
    ways: dict[str, tuple[Model, tuple[Step, ...]]] = {}
    if not beside or offers.runs.ranks:
        ways[KEPT if beside else MERGED] = tuned.model, ()
    if beside:
        opened = tuned.model.with_layers({i: unpacked(tuned.model.layers[i]) for i in beside})
        own = replace(calibration, beside={})  # fine-tuned states are not the original's, nor should they be
        merged, ends = _in_sequence(own, opened, bits, offers, left)
        ways |= {} if merged is None else {MERGED: (merged, ends)}
    measured = tuple(_apart(calibration, offers, *way) for way in ways.values())
    numbers = list(made.moe_layers)
    before, kept = (tuple(m.layers[i] for i in numbers) for m in (made, tuned.model))
    word = offers.runs.word
    best = fit.taken(calibration.model.essential, best, measured, before, kept, ways=list(ways), layers=numbers, engine=word)

    def picked(one: Step, *others: Step) -> Step:
        return one if {s.key for s in others} <= {one.key} else fit.recovered(best, (one, *others), ways=list(ways))

    models = [model for model, _ in ways.values()]
    layers = {i: picked(one, *(m.layers[i] for m in models)) for i, one in enumerate(made.layers)}
    return best, replace(made.with_layers(layers), rest=picked(made.rest, *(m.rest for m in models))), tuned.reports


def _not_on_offer(left: Mapping[str, str]) -> list[str]:
    """What cannot be had, in a line for each kind of reason: the first with its own, and what is left out likewise."""
    kinds: dict[str, list[str]] = {}
    for what, why in left.items():
        kinds.setdefault(NUMBER.sub("", why), []).append(what)
    return [
        f"{first} not on offer: {left[first]}" + (f"; nor, for the like, {'; '.join(others)}" if others else "")
        for first, *others in kinds.values()
    ]


def _in_sequence(
    calibration: Calibration, plain: Model, bits: Step, offers: Offers, left: dict[str, str]
) -> tuple[Model | None, tuple[Step, ...]]:
    """The chosen model, quantized layer by layer, each by what its block takes in behind the quantized ones; its last states.

    As it is if no bits are on offer, without states; None if not every layer can be quantized, and the reason goes to `left` then.
    """
    dtype = calibration.dtype
    if not offers.packs:
        return plain, ()
    passed = replace(calibration.passed, shard=_smaller(calibration.passed, calibration.tokens))
    how = replace(_quantized(offers, max(offers.packs)), target="model" if calibration.beside else "expert")

    def packed(at: int, file: Step, recorded: tuple[Part, ...]) -> Step:
        beside = calibration.beside.get(at, ())
        return slimmed_as_decided(bits, plain.essential, file, recorded, beside, at=at, how=how, dtype=dtype)

    again = calibrate.run(plain, calibration.tokens, passed)
    try:
        layers, ends = in_sequence(again, packed, statistics=False, beside=bool(calibration.beside))
    except ValueError as error:
        left["quantizing in sequence"] = str(error)
        return None, ()
    return plain.with_layers(layers), ends


def _smaller(passed: Pass, tokens: Step) -> int:
    """The sequences of shards of at most `SHARD` tokens, if a sequence has no more, that are parts of the pass's own."""
    most = max(1, SHARD // max(1, tokens.spec.output.length))
    return max(size for size in range(1, most + 1) if passed.shard % size == 0)


def _either(best: Step, alone: Model, again: Model) -> Model:
    """The model that is closer to the original, as the choice says."""

    def picked(one: Step, other: Step) -> Step:
        return one if one.key == other.key else fit.either(best, one, other)

    layers = {i: picked(one, other) for i, (one, other) in enumerate(zip(alone.layers, again.layers, strict=True))}
    return replace(alone.with_layers(layers), rest=picked(alone.rest, again.rest))


def _forks(of_layer: dict[Alternative, Made], around: Step | None) -> Alternatives:
    """What is measured of a layer's alternatives: around the original all but the original."""
    own, *others = [a.name for a in of_layer]
    files = tuple(made.file for made in of_layer.values())
    if around is None:
        return Alternatives(Forks("files", tuple(others)), files[1:])
    return Alternatives(Forks("files", (own, *others), replaced=True), files, whole=files[0])


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
    observed, how = calibration.observed[layer], _quantized(offers, alternative.bits, alternative.group)

    def packed() -> Step:
        return slimmed(calibration.model.essential, plain, observed, at=layer, how=how, dtype=calibration.dtype)

    return _allowed(alternative, packed, left, plain)


def _quantized(offers: Offers, bits: int, group: int = 0) -> Slimming:
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
