"""One budget for a whole model: every layer is offered alternatives, and the combination that moves the model least is built.

An alternative (`moeflow.methods.recipes.offered`) is measured alone, as the divergence of the whole model's predictions; under one
budget the best combination is a multiple-choice knapsack, solved exactly. Costs add up only nearly, so a second round measures the
most promising ones again around the first choice, or, for an engine that runs layers of one kind only, the most promising models
whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.calibrate.chains import Alternatives, Forks
from moeflow.methods.checkpoint.export import written
from moeflow.methods.fit import steps as fit
from moeflow.methods.fit.choosing import LISTED, RANKED
from moeflow.methods.fit.options import Alternative, Budget, Offers
from moeflow.methods.fit.recovering import KEPT, MERGED
from moeflow.methods.graph import Calibration, Model, Pass
from moeflow.methods.recipes.offered import Made, not_on_offer, on_offer, quantized
from moeflow.methods.recipes.sequence import in_sequence
from moeflow.methods.recipes.tune import Tuned
from moeflow.methods.records import Shortlist
from moeflow.methods.slim.steps import slimmed_as_decided, unpacked
from moeflow.step import Part, Step

SHARD = 16_384
"""Tokens of a shard where layers are quantized in sequence: each waits for the one before, and more GPUs share a wait then."""


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
    offers, offered, left = on_offer(calibration, offers)
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
        raise ValueError("; ".join([str(error), *not_on_offer(left)])) from None
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
    told = fit.report(best).noting(*not_on_offer(left))
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
    unseen = _unseen(calibration, tuned.unseen, (made, *(model for model, _ in ways.values())))
    best = fit.taken(
        calibration.model.essential, best, measured, before, kept, unseen, ways=list(ways), layers=numbers, engine=word
    )

    def picked(one: Step, *others: Step) -> Step:
        return one if {s.key for s in others} <= {one.key} else fit.recovered(best, (one, *others), ways=list(ways))

    models = [model for model, _ in ways.values()]
    layers = {i: picked(one, *(m.layers[i] for m in models)) for i, one in enumerate(made.layers)}
    return best, replace(made.with_layers(layers), rest=picked(made.rest, *(m.rest for m in models))), tuned.reports


def _unseen(calibration: Calibration, tokens: Step | None, models: Sequence[Model]) -> tuple[Step, ...]:
    """How far each model is from the original on tokens that nothing was made by; nothing if there are none."""
    if tokens is None:
        return ()
    passed = replace(calibration.passed, record=0)
    other = calibrate.run(calibration.model, tokens, passed, inputs=False)
    return tuple(calibrate.curves(other, {}, tokens=tokens.spec.output.tokens, around=model) for model in models)


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
    how = replace(quantized(offers, max(offers.packs)), target="model" if calibration.beside else "expert")

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
