"""Choose one alternative of each layer: the least cost within a budget, among what an engine runs together. Numbers, no torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, isfinite, sqrt

from moeflow.engines import Engine
from moeflow.methods.fit.knapsack import cheapest, least
from moeflow.methods.fit.options import Alternative
from moeflow.methods.records import Record
from moeflow.sizes import bytes_text

POINTS = 24
"""Budgets of the predicted frontier."""

LISTED = 12
"""The alternatives of each layer that are measured again around a choice."""

RANKED = 3
"""How many whole models are measured beside each other where an engine runs layers of one kind only."""

MOST = 100
"""How many times as many tokens are worth being asked for, to tell two choices apart."""


@dataclass(frozen=True)
class Option:
    """An alternative of one layer with what it takes and what it costs."""

    what: Alternative
    size: float
    """In the unit of the budget."""
    cost: float
    """How far the model's predictions move when this layer alone is so: KL divergence, nats per token."""


Offered = Mapping[int, Mapping[str, Option]]
"""By layer and name of the alternative."""


@dataclass(frozen=True)
class Lead:
    """By how much a choice costs less than the next best, paired over the sequences that both were measured on."""

    mean: float
    """Nats per token."""
    noise: float
    """Half of its 95 % interval."""
    tokens: int
    """The tokens that were compared."""

    @property
    def asks(self) -> int:
        """How many tokens would tell the two apart, if the lead is what it was measured to be."""
        return round(self.tokens * (self.noise / self.mean) ** 2) if self.mean > 0 else 0

    @property
    def words(self) -> str:
        """Why the calibration is too small to tell; "" if it is not, or both are the same on all of it."""
        if self.mean > self.noise or not (self.mean or self.noise):
            return ""
        far = not 0 < self.asks <= MOST * self.tokens
        more = "and there is little to tell" if far else f"about {self.asks:,} would tell"
        return (
            f"the choice leads the next best by {self.mean:.2g} nats a token, give or take {self.noise:.2g}: {self.tokens:,} "
            f"tokens are too few to tell them apart, {more} (offers.measured)"
        )


@dataclass(frozen=True)
class Point:
    """One point of the frontier."""

    size: float
    cost: float


@dataclass(frozen=True)
class Fitted(Record):
    """Which alternative each layer becomes."""

    FILE = "fit.json"
    LEVELS = 3

    engine: str
    unit: str
    """What the budget counts: "bytes", "resident" bytes or "operations" of a token."""
    budget: float
    size: float
    """What the whole model takes."""
    whole: float
    """What the original takes."""
    cost: float
    """The predicted divergence from the original, nats per token."""
    chosen: Mapping[int, str]
    """By layer, the name of its alternative."""
    tokens: int
    """The predictions that the costs were measured on."""
    frontier: tuple[Point, ...] = ()
    """The least predicted cost at other budgets, from the smallest."""
    marks: Mapping[str, Point] = field(default_factory=dict)
    """The recipes of the papers on the same scale: predicted, too."""
    before: float | None = None
    """The measured divergence: of this choice, or of the one around which its costs were measured, if it was decided behind one."""
    again: bool = False
    """Whether the chosen layers were made again, each quantized behind those before it, which brought the model closer."""
    recovered: str = ""
    """What was taken of a fine-tuning: "merged", packed by quantizing again; "kept" beside the packed weights; "" if none was
    closer."""
    tried: Mapping[str, float] = field(default_factory=dict)
    """The measured divergence of each of them, if it was tuned."""
    unseen: Mapping[str, float] = field(default_factory=dict)
    """The same, and of the model as it was (""), on tokens that the original wrote, by which nothing was made."""
    over: float = 0.0
    """By how much keeping it would exceed the budget; 0: there is room."""
    lead: Lead | None = None
    """By how much it costs less than the next best; None if nothing else fits."""
    table: Mapping[int, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    """By layer and alternative, its size and its cost: how much farther it is than the choice around which it was measured, if
    there is one."""
    alone: Mapping[int, float] = field(default_factory=dict)
    """By layer, how far the original is with the chosen alternative in this layer alone."""


def choose(offered: Offered, engine: Engine, room: float, rest: float = 0.0, unit: str = "operations") -> dict[int, str]:
    """The alternatives that cost least together and take at most `room`, beside a `rest` that stays. Some layer keeps experts.

    `unit`: that of a `Budget`, for messages. Raises ValueError with the nearest that can be had.
    """
    return ranked(offered, engine, room, rest, unit)[0]


def ranked(offered: Offered, engine: Engine, room: float, rest: float = 0.0, unit: str = "operations") -> list[dict[int, str]]:
    """The same of each part of the offer of which the engine loads any combination, the cheapest first; of an engine that runs
    layers of one kind only, these are all that it could be given. Raises as `choose`."""
    best: list[tuple[float, dict[int, str]]] = []
    for subset in together(offered, engine):
        found = _cheapest(subset, room)
        if found is not None and not any(subset[i][name].what.keep for i, name in found.items()):
            # no checkpoint is without experts: each layer in turn has to keep some
            each = [one for part in _holding(subset) if (one := _cheapest(part, room)) is not None]
            found = min(each, key=lambda one: _cost(subset, one), default=None)
        if found is not None:
            best.append((_cost(subset, found), found))
    if not best:
        asked, nearest = room + rest, smallest(offered, engine) + rest
        words = f"{asked:,.0f}", f"{nearest:,.0f}"
        if unit != "operations":
            near = bytes_text(nearest, up=True)
            words = bytes_text(asked), near if near != bytes_text(asked) else f"{ceil(nearest):,} bytes"
        raise ValueError(f"nothing that was offered takes {words[0]} or less; the nearest that can be had is {words[1]}")
    return [found for _, found in sorted(best, key=lambda one: one[0])]


def _cheapest(part: Offered, room: float) -> dict[int, str] | None:
    """What costs least of options that go with each other; None if nothing fits."""
    curves = [[(o.size, o.cost) for o in options.values()] for options in part.values()]
    if least(curves) > room:
        return None
    names = [[*options] for options in part.values()]
    return {i: n[at] for i, n, at in zip(part, names, cheapest(curves, room), strict=True)}


def _cost(part: Offered, chosen: Mapping[int, str]) -> float:
    return sum(part[i][name].cost for i, name in chosen.items())


def _holding(part: Offered) -> Iterator[Offered]:
    """The same options, once for each layer that can keep experts, which it has to."""
    for i, options in part.items():
        if holding := {n: o for n, o in options.items() if o.what.keep}:
            yield {**part, i: holding}


def next_best(offered: Offered, engine: Engine, room: float, chosen: Mapping[int, str]) -> dict[int, str] | None:
    """What costs least of all that fits and differs from the chosen in some layer; None if nothing does.

    Where all layers have to be packed alike, as the chosen are.
    """
    alike = offered
    if not engine.mixed:
        ways = {offered[i][name].what.packing for i, name in chosen.items() if offered[i][name].what.keep}
        alike = {
            i: {n: o for n, o in options.items() if o.what.packing in ways or not o.what.keep} for i, options in offered.items()
        }
    best: tuple[float, dict[int, str]] | None = None
    for layer, name in chosen.items():
        others = {**alike, layer: {n: o for n, o in alike[layer].items() if n != name}}
        try:
            picked = choose(others, engine, room)
        except ValueError:
            continue
        cost = sum(offered[i][n].cost for i, n in picked.items())
        if best is None or cost < best[0]:
            best = cost, picked
    return None if best is None else best[1]


def promising(offered: Offered, engine: Engine, chosen: Mapping[int, str]) -> dict[int, tuple[str, ...]]:
    """The `LISTED` alternatives of each layer that cost least at the price of the chosen sizes, the chosen one first.

    The price of a unit of size is the lowest at which all layers together, each by its own, take no more than was chosen: what is
    best around there is what another choice could be made of.
    """
    size = sum(offered[i][name].size for i, name in chosen.items())
    parts = [p for p in together(offered, engine) if all(name in p[i] for i, name in chosen.items())]
    part = max(parts, key=lambda p: sum(map(len, p.values())))

    def at(price: float) -> dict[int, list[str]]:
        return {i: sorted(options, key=lambda n: options[n].cost + price * options[n].size) for i, options in part.items()}

    def taken(price: float) -> float:
        return sum(part[i][names[0]].size for i, names in at(price).items())

    low, high = 0.0, max(o.cost for options in part.values() for o in options.values())  # sizes differ by one unit at the least
    for _ in range(96):
        middle = (low + high) / 2
        low, high = (middle, high) if taken(middle) > size else (low, middle)
    best = at(high)
    return {i: (name, *(n for n in best[i] if n != name))[:LISTED] for i, name in chosen.items()}


def lead(ours: Sequence[float], theirs: Sequence[float], tokens: int) -> Lead:
    """By how much `ours` cost less than `theirs`, sequence by sequence; there are at least two."""
    differences = [b - a for a, b in zip(ours, theirs, strict=True)]
    count, mean = len(differences), sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (count - 1)
    return Lead(mean, 1.96 * sqrt(variance / count), tokens)


def nearest(apart: Sequence[float]) -> int:
    """Which of several models is closest to the original. Raises ValueError if all of them predict what is no number."""
    known = [n for n, divergence in enumerate(apart) if isfinite(divergence)]
    if not known:
        raise ValueError("the chosen models predict what is no number; measure in another precision, or offer more bits")
    return min(known, key=lambda n: apart[n])


def smallest(offered: Offered, engine: Engine) -> float:
    """The least that the layers can take together, of which one keeps experts."""
    every = (part for subset in together(offered, engine) for part in _holding(subset))
    return min((sum(min(o.size for o in options.values()) for options in part.values()) for part in every), default=0.0)


def together(offered: Offered, engine: Engine) -> Iterator[dict[int, dict[str, Option]]]:
    """The parts of the offer of which the engine loads any combination: packed alike, and of one count, where it has to be."""
    loaded = {i: {n: o for n, o in options.items() if not _odd(o.what, engine)} for i, options in offered.items()}
    every = [o.what for options in loaded.values() for o in options.values()]
    ways = [None] if engine.mixed else sorted({a.packing for a in every})
    counts = [None] if engine.counts else sorted({a.keep for a in every})
    for way in ways:
        for count in counts:
            part = {i: {n: o for n, o in options.items() if _fits(o.what, way, count)} for i, options in loaded.items()}
            if all(part.values()):
                yield part


def _odd(what: Alternative, engine: Engine) -> bool:
    """Whether the engine runs no layer with so many experts, which the original may have."""
    return bool(what.keep and engine.why_not_count(what.keep))


def _fits(what: Alternative, way: tuple[int, int] | None, count: int | None) -> bool:
    """Whether an alternative is packed this way and has this count, where they are asked for; without experts it is not packed."""
    return (way in (None, what.packing) or not what.keep) and count in (None, what.keep)


def frontier(offered: Offered, engine: Engine, rest: float, points: int = POINTS) -> tuple[Point, ...]:
    """The least predicted cost at evenly spaced budgets, between the least that can be had and the whole."""
    low, high = smallest(offered, engine), sum(max(o.size for o in options.values()) for options in offered.values())
    found: list[Point] = []
    for n in range(points + 1):
        chosen = choose(offered, engine, low + (high - low) * n / points)
        picked = [offered[i][name] for i, name in chosen.items()]
        point = Point(rest + sum(o.size for o in picked), sum(o.cost for o in picked))
        if not found or point.cost < found[-1].cost:
            found.append(point)
    return tuple(found)
