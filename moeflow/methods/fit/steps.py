"""Choose what each layer becomes, and take it: one budget, and the least divergence from the original that fits into it."""

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from typing import Any

from moeflow.arch import Family
from moeflow.engines import engine_of
from moeflow.methods.fit.choosing import Fitted, Lead, Offered, Option, Point, frontier, lead, nearest, next_best, promising, ranked
from moeflow.methods.fit.options import Alternative, Budget
from moeflow.methods.fit.reach import NEARLY, Offer, in_reach, most_saved, most_taken, out_of_reach
from moeflow.methods.fit.recovering import WORDS, told, with_recovered
from moeflow.methods.fit.sizes import expected, size
from moeflow.methods.records import Bits, Curves, Shortlist
from moeflow.methods.reports import row, write_report
from moeflow.methods.rewrite import link_all
from moeflow.model.layout import read_config
from moeflow.model.spec import LayerSpec, RestSpec
from moeflow.step import Artifact, Context, Spec, step


def _decide_spec(
    rest: RestSpec, curves: Any, fixed: tuple[Any, ...], files: tuple[tuple[LayerSpec, ...], ...],
    before: Any = None, *, offer: Offer, budget: Budget, engine: str, place: int = 0,
) -> Spec:  # fmt: skip
    every = [f for of_layer in files for f in of_layer]
    writes = 2000 + 120 * len(every)
    runs = engine_of(engine, model_type=Family.of(rest.config).arch.model_type)
    each = [[expected(f, budget.unit, runs) for f in of_layer] for of_layer in files]
    whole = round(expected(rest, budget.unit, runs) + sum(expected(f, budget.unit, runs) for f in fixed) + sum(s[0] for s in each))
    least = whole - most_saved([[bool(f.experts) for f in of_layer] for of_layer in files], each)
    if budget.most(whole) < NEARLY[budget.unit] * least:
        raise ValueError(out_of_reach(budget, least, whole, offer, each))
    most = most_taken(runs, offer, each, whole)
    notes = in_reach(budget, least, most, whole, offer, each) if before is None and not place else ()
    out = {"bytes": writes, "part": min(1.0, budget.most(whole) / whole) if budget.unit == "bytes" else 1.0}
    reads = curves["bytes"] + (sum(f.headers for f in every) if budget.unit != "bytes" else 0)
    return Spec(out, reads=reads, writes=writes, memory=1 << 28, notes=notes)


@step("fit.decide", version=6, spec=_decide_spec)
def decide(
    context: Context, rest: Artifact, curves: Artifact, fixed: tuple[Artifact, ...],
    files: tuple[tuple[Artifact, ...], ...], before: Artifact | None = None,
    *, offer: Offer, budget: Budget, engine: str, place: int = 0,
) -> None:  # fmt: skip
    """Which of its alternatives each layer becomes, as `Fitted`: the least cost that takes no more than the budget, exactly; and a
    `Shortlist` of those that are worth being measured again around it.

    `files`: for each layer of `offer` its alternatives; `fixed`: the other layers, which have no experts, and what else is in the
    checkpoint beside `rest`, the embedding and head; `curves`: what each alternative costs alone. `before`: the choice around which
    these costs were measured, None for the original. `place`: 0 for the cheapest; 1 for the cheapest of another kind, where the
    engine runs layers of one kind only, and so on, the last if there are no more.
    Raises ValueError if nothing on offer fits.
    """
    read, measured = read_config(rest), Curves.read(curves)
    runs = engine_of(engine, model_type=Family.of(read).arch.model_type)
    first = None if before is None else Fitted.read(before)
    offered: dict[int, dict[str, Option]] = {}
    for (name, alternatives), artifacts in zip(offer.items(), files, strict=True):
        layer, known = int(name), measured.curves.get(int(name), {})
        costs = {n: cost for n, cost in known.items() if isfinite(cost)}
        if broken := [n for n in known if n not in costs]:
            context.note(f"layer {name} is left without {', '.join(broken)}: with that the model predicts what is no number")
        own = alternatives[0].name if first is None else first.chosen[layer]
        offered[layer] = {
            a.name: Option(a, size(f, budget.unit, runs, read, layer), _cost(costs, a.name, measured.apart, own))
            for a, f in zip(alternatives, artifacts, strict=True)
            if a.name == own or a.name in costs
        }
        context.progress(len(offered), len(offer), "layers")
    dense = [i for i in range(Family.of(read).num_layers) if str(i) not in offer]
    others = size(rest, budget.unit, runs, read) + sum(
        size(f, budget.unit, runs, read, i) for f, i in zip(fixed, dense, strict=False)
    )
    others += sum(size(f, "bytes", runs, read) for f in fixed[len(dense) :] if budget.unit != "operations")
    whole = others + sum(size(of_layer[0], budget.unit, runs, read, int(i)) for i, of_layer in zip(offer, files, strict=True))
    room = budget.most(int(whole)) - others
    possible = ranked(offered, runs, room, others, budget.unit)
    chosen = possible[min(place, len(possible) - 1)]
    picked = [offered[i][name] for i, name in chosen.items()]
    ahead = None if place else _lead(offered, measured, chosen, next_best(offered, runs, room, chosen), first)
    if len(measured.apart_of_sequences) < 2:
        context.note(
            f"alternatives were measured on {measured.tokens:,} tokens of one sequence, which says nothing of others: calibrate on "
            "more of them (calibration.sequences, offers.measured)"
        )
    if ahead is not None and ahead.words:
        context.note(ahead.words)
    table = _table(offered)
    measured_alone = table if first is None else first.table
    Fitted(
        engine=engine, unit=budget.unit, budget=room + others, size=others + sum(o.size for o in picked), whole=whole,
        cost=measured.apart + sum(o.cost for o in picked), chosen=chosen, tokens=measured.tokens,
        frontier=frontier(offered, runs, others) if first is None else first.frontier,
        marks=_marks(offered, others) if first is None else first.marks,
        before=None if first is None else measured.apart, lead=ahead, table=table,
        alone={i: measured_alone[i][name][1] for i, name in chosen.items() if name in measured_alone[i]},
    ).write(context.out)  # fmt: skip
    Shortlist(promising(offered, runs, chosen)).write(context.out)


def _cost(costs: Mapping[str, float], name: str, apart: float, own: str) -> float:
    """How much farther from the original a layer's alternative is than its `own`; from the original nothing is nearer than that."""
    return 0.0 if name == own else costs[name] - apart if apart else max(0.0, costs[name])


def _lead(
    offered: Offered, measured: Curves, chosen: Mapping[int, str], other: Mapping[int, str] | None, first: Fitted | None
) -> Lead | None:
    """By how much the chosen costs less than the other combination, on the same sequences."""
    if other is None or len(measured.apart_of_sequences) < 2:
        return None

    def each(names: Mapping[int, str]) -> list[float]:
        total = [0.0] * len(measured.apart_of_sequences)
        for i, name in names.items():
            own = next(iter(offered[i])) if first is None else first.chosen[i]
            costs = measured.apart_of_sequences if name == own else measured.sequences[i][name]
            total = [t + c - a for t, c, a in zip(total, costs, measured.apart_of_sequences, strict=True)]
        return total

    return lead(each(chosen), each(other), measured.tokens)


def _table(offered: Offered) -> dict[int, dict[str, tuple[float, float]]]:
    return {i: {name: (o.size, o.cost) for name, o in options.items()} for i, options in offered.items()}


def _better_spec(choices: tuple[Any, ...], measured: tuple[Any, ...]) -> Spec:
    size = max(c["bytes"] for c in choices)
    return Spec(choices[-1], reads=sum(s["bytes"] for s in (*choices, *measured)), writes=size)


@step("fit.better", version=1, spec=_better_spec)
def better(context: Context, choices: tuple[Artifact, ...], measured: tuple[Artifact, ...]) -> None:
    """The choice whose model is closest to the original; `measured` are the divergences of their models, as `Curves`."""
    apart = [Curves.read(curves).apart for curves in measured]
    best = nearest(apart)
    replace(Fitted.read(choices[best]), before=apart[best]).write(context.out)


def _bits_spec(chosen: Any, *, offer: Offer) -> Spec:
    return Spec({"bytes": 40 + 20 * len(offer)}, reads=chosen["bytes"], writes=40 + 20 * len(offer))


@step("fit.bits", version=2, spec=_bits_spec)
def bits(context: Context, chosen: Artifact, *, offer: Offer) -> None:
    """To how many bits the choice quantizes each layer, and in which groups."""
    alternatives = {int(i): {a.name: a for a in of_layer} for i, of_layer in offer.items()}
    picked = {i: alternatives[i][name] for i, name in Fitted.read(chosen).chosen.items()}
    Bits({i: a.bits for i, a in picked.items() if a.bits}, {i: a.group for i, a in picked.items() if a.group}).write(context.out)


def _nearer_spec(chosen: Any, last: Any, measured: Any) -> Spec:
    return Spec(chosen, reads=chosen["bytes"] + last["bytes"] + measured["bytes"], writes=last["bytes"])


@step("fit.nearer", version=2, spec=_nearer_spec)
def nearer(context: Context, chosen: Artifact, last: Artifact, measured: Artifact) -> None:
    """The choice, or the `last` one, if its model, made again with its layers quantized in sequence, is closer to the original.

    `measured`: the divergence of that model. It is made while the choices are compared, whichever of them is best.
    """
    fitted, apart = Fitted.read(chosen), Curves.read(measured).apart
    if fitted.before is None or apart < fitted.before:
        fitted = replace(Fitted.read(last), before=apart, again=True)
    fitted.write(context.out)


def _either_spec(chosen: Any, alone: Any, again: Any) -> Spec:
    if isinstance(alone, LayerSpec):
        alone = replace(alone, elsewhere=alone.elsewhere or again.elsewhere)
    return Spec(alone, reads=0, writes=0, memory=1 << 24)


@step("fit.either", version=1, spec=_either_spec)
def either(context: Context, chosen: Artifact, alone: Artifact, again: Artifact) -> None:
    """A layer, or the rest, of the model that is closer to the original: each made alone, or all made `again`."""
    link_all(context, again if Fitted.read(chosen).again else alone)


def _layer_spec(chosen: Any, files: tuple[LayerSpec, ...], *, layer: int, offer: list[Alternative], engine: str) -> Spec:
    """As the alternative that is nearest to the budget; packed if any is, which says how the checkpoint may be written."""
    own = files[0]
    runs = engine_of(engine, model_type=Family.of(own.config).arch.model_type)
    possible = [f for a, f in zip(offer, files, strict=True) if f.experts and not runs.why_not_count(a.keep)]
    packed = [f for f in possible if f.packed]
    near = min(packed or possible, key=lambda f: abs(f.nbytes - chosen["part"] * own.nbytes))
    fewest = min(a.keep for a in offer)
    multiple = max(f.multiple for f in files)  # what is to be packed has ranks that can be
    decided, widths = any(f.ranks_decided or f.low_rank for f in files), {f.packed for f in files}
    out = replace(
        near, share=1.0, fewest=fewest, alike=not runs.counts, ranks_decided=decided, multiple=multiple,
        bits_decided=runs.mixed and len(widths) > 1, elsewhere=any(f.elsewhere for f in files), changed=not near.elsewhere,
    )  # fmt: skip
    return Spec(out, reads=0, writes=0, memory=1 << 24)


@step("fit.layer", version=1, spec=_layer_spec)
def layer(
    context: Context, chosen: Artifact, files: tuple[Artifact, ...], *, layer: int, offer: list[Alternative], engine: str
) -> None:
    """The files of what was chosen for this layer, among its alternatives; `engine`: what is to load the result."""
    name = Fitted.read(chosen).chosen[layer]
    link_all(context, files[[a.name for a in offer].index(name)])


def _frontier_spec(chosen: Any) -> Spec:
    return Spec(reads=chosen["bytes"], writes=4000, figures=("budget", "taken", "predicted_kl", "measured_kl"))


@step("fit.frontier", version=4, spec=_frontier_spec)
def report(context: Context, chosen: Artifact) -> None:
    """What was chosen, and what other budgets would cost: predicted, and measured on the calibration's own text."""
    fit = Fitted.read(chosen)
    unit = {"bytes": "B", "resident": "B", "operations": ""}[fit.unit]
    taken = row(f"taken, {fit.unit}", fit.whole, fit.size, unit, figure="taken", better="lower")
    rows = [row(f"budget, {fit.unit}", fit.whole, fit.budget, unit, figure="budget"), taken]
    for how, cost in (("predicted", fit.cost), ("measured", fit.before)):
        if cost is not None:
            name = f"KL to the original, {how} (calibration text)"
            rows.append(row(name, 0.0, cost, "nats/token", figure=f"{how}_kl", better="lower"))
    rows += [
        row(f"KL to the original, {WORDS[way]} ({text})", 0.0, cost, "nats/token")
        for text, costs in (("calibration text", fit.tried), ("text that the original wrote", fit.unseen))
        for way, cost in costs.items()
    ]
    rows += [row(f"predicted KL at {point.size / fit.whole:.0%} of the {fit.unit}", 0.0, point.cost, "") for point in fit.frontier]
    rows += [
        row(f"predicted KL of {what}, at {point.size / fit.whole:.0%}", 0.0, point.cost, "") for what, point in fit.marks.items()
    ]
    taken_of = {"recovered": WORDS[fit.recovered]} if fit.tried else {}
    write_report(context, "fit", rows, engine=fit.engine, tokens=fit.tokens, chosen=fit.chosen, **taken_of)


def _marks(offered: Offered, others: float) -> dict[str, Point]:
    """The recipes of the papers on the same scale: one alternative of one kind, the same in all layers."""
    first, *more = offered.values()
    marks = {}
    for name, option in first.items():
        kind = _recipe(option.what, next(iter(first.values())).what.keep)
        if kind and all(name in of_layer for of_layer in more):
            everywhere = [of_layer[name] for of_layer in offered.values()]
            marks[f"{kind}, {name} everywhere"] = Point(others + sum(o.size for o in everywhere), sum(o.cost for o in everywhere))
    return marks


def _recipe(alternative: Alternative, experts: int) -> str:
    """The recipe that gives this alternative to all layers of so many experts; "" if none is known by a name."""
    if 0 < alternative.keep < experts:
        return "" if alternative.ratio or alternative.bits else "NAEE"
    if alternative.ratio:
        return "" if alternative.bits else "ranks alone, as MoE-I²"
    return "GPTQ, as expert slimming" if alternative.bits else ""


def _taken_spec(
    config: RestSpec, chosen: Any, measured: tuple[Any, ...], before: tuple[LayerSpec, ...], kept: tuple[LayerSpec, ...],
    unseen: tuple[Any, ...] = (), *, ways: list[str], layers: list[int], engine: str,
) -> Spec:  # fmt: skip
    reads = chosen["bytes"] + sum(m["bytes"] for m in (*measured, *unseen)) + sum(f.headers for f in (*before, *kept))
    return Spec(chosen, reads=reads, writes=chosen["bytes"] + 400, memory=1 << 26)


@step("fit.taken", version=2, spec=_taken_spec)
def taken(
    context: Context, config: Artifact, chosen: Artifact, measured: tuple[Artifact, ...], before: tuple[Artifact, ...],
    kept: tuple[Artifact, ...], unseen: tuple[Artifact, ...] = (), *, ways: list[str], layers: list[int], engine: str,
) -> None:  # fmt: skip
    """The choice, and which of these `ways` to take a fine-tuning of its model is closest to the original, if any is closer.

    `measured`: the divergence by each. `before` and `kept`: the layers with these numbers without the fine-tuning, and with what
    was trained beside the packed weights. `unseen`: the divergence of the model, and by each way, on tokens that the original
    wrote: the choice was made by the calibration's, on which a model that was trained on others looks worse than it is.
    """
    fitted, read = Fitted.read(chosen), read_config(config)
    runs = engine_of(engine, model_type=Family.of(read).arch.model_type)
    tried, elsewhere = (
        {way: Curves.read(curves).apart for way, curves in zip(names, every, strict=bool(every))}
        for names, every in ((ways, measured), (["", *ways], unseen))
    )
    sizes = (sum(size(f, fitted.unit, runs, read, i) for f, i in zip(files, layers, strict=True)) for files in (kept, before))
    settled = with_recovered(fitted, tried, next(sizes) - next(sizes), elsewhere)
    settled.write(context.out)
    context.note(told(fitted, settled))


def _recovered_spec(chosen: Any, every: tuple[LayerSpec | RestSpec, ...], *, ways: list[str]) -> Spec:
    return Spec(max(every, key=lambda f: f.nbytes), reads=0, writes=0, memory=1 << 24)


@step("fit.recovered", version=1, spec=_recovered_spec)
def recovered(context: Context, chosen: Artifact, every: tuple[Artifact, ...], *, ways: list[str]) -> None:
    """A layer, or the rest, as the choice takes it: `every` has it without the fine-tuning, and then by each of these `ways`."""
    link_all(context, every[["", *ways].index(Fitted.read(chosen).recovered)])
