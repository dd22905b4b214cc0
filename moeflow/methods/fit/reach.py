"""Which budgets can be had, before anything runs: from headers alone. No torch."""

from collections.abc import Callable, Mapping, Sequence
from math import inf

from moeflow.engines import Engine
from moeflow.methods.fit.options import Alternative, Budget
from moeflow.sizes import bytes_text

Offer = Mapping[str, list[Alternative]]
"""By layer, what it may become, in the order of the artifacts; the first is the layer as it is."""

GONE = "no MoE blocks"
NEARLY = {"bytes": 0.98, "resident": 0.85, "operations": 0.95}
"""How far below what seems to be the least a budget may be: the run decides ranks, and with them padding and what they save."""
Sizes = Sequence[Sequence[float]]
"""How much each alternative takes, layer by layer."""


def most_saved(keeping: Sequence[Sequence[bool]], sizes: Sizes) -> int:
    """The most that alternatives of these sizes could save; `keeping`: which keep experts, as one layer at least has to."""
    saved, forgone = 0.0, []
    for keeps, each in zip(keeping, sizes, strict=True):
        saved += each[0] - min(each)
        forgone.append(min((size for kept, size in zip(keeps, each, strict=True) if kept), default=inf) - min(each))
    return round(saved - min(forgone))


def most_taken(engine: Engine, offer: Offer, sizes: Sizes, whole: int) -> int:
    """The most that a model of a `whole` size can take in this engine, which may run no layer with as many experts as it has."""
    saved = 0.0
    for alternatives, each in zip(offer.values(), sizes, strict=True):
        runs = [size for a, size in zip(alternatives, each, strict=True) if not (a.keep and engine.why_not_count(a.keep))]
        saved += each[0] - max(runs, default=each[0])
    return round(whole - saved)


def in_reach(budget: Budget, least: float, most: float, whole: float, offer: Offer, sizes: Sizes) -> tuple[str, ...]:
    """Which budgets can be had, as notes; also if the model needs none of them, or if it is not certain that this one can."""
    room = budget.most(int(whole))
    notes = ("the model fits into this budget as it is",) * (room >= whole == most)
    if budget.unit == "operations":
        maybe = f"so many fewer as {budget.speed:g} times are beyond that, as far as is known before layers are made; it is tried"
        return (f"a token's operations can become up to {whole / least:.3g} times fewer", *notes, *(maybe,) * (room < least))
    what = "a budget in bytes" if budget.unit == "bytes" else "a budget of resident bytes"
    maybe = f"{bytes_text(room)} is below that, as far as is known before layers are made; it is tried"
    reach = f"{what} can be from {bytes_text(least, up=True)} to {bytes_text(most)}: {_by_kind(whole, offer, sizes)}"
    return (reach, *notes, *(maybe,) * (room < least))


def out_of_reach(budget: Budget, least: int, whole: int, offer: Offer, sizes: Sizes) -> str:
    """Why a budget cannot be met, and what can."""
    if budget.unit == "operations":
        return (
            f"{budget.speed:g} times fewer operations a token cannot be had: what is offered takes up to {whole / least:.3g} times "
            "fewer"
        )
    asked = bytes_text(budget.most(whole)) + " in memory" * (budget.unit == "resident")
    return (
        f"a budget of {asked} cannot be met: what is offered takes {bytes_text(least, up=True)} at the least, of "
        f"{bytes_text(whole)}; {budget.meant(least, whole) or f'offered are {_by_kind(whole, offer, sizes)}'}"
    )


def _by_kind(whole: float, offer: Offer, sizes: Sizes) -> str:
    """The least bytes that each kind of alternative could leave by itself."""
    kinds: dict[str, Callable[[Alternative, int], bool]] = {
        "fewer experts": lambda a, _: a.keep > 0 and not a.ratio and not a.bits,
        "lower ranks": lambda a, _: a.ratio > 0 and not a.bits,
        "fewer bits": lambda a, experts: a.bits > 0 and not a.ratio and a.keep == experts,
        "two together": lambda a, experts: a.bits > 0 and (a.ratio > 0 or a.keep < experts),
        GONE: lambda a, _: a.keep == 0,
    }
    reached = []
    for words, of_kind in kinds.items():
        saved = []
        for alternatives, each in zip(offer.values(), sizes, strict=True):
            left = [size for a, size in zip(alternatives, each, strict=True) if of_kind(a, alternatives[0].keep)]
            saved.append(each[0] - min(left, default=each[0]))
        most = sum(saved) - (min(saved) if words == GONE else 0)  # one keeps its own
        reached += [f"{words} {bytes_text(whole - most, up=True)}"] * (most > 0)
    return ", ".join(reached)
