"""What becomes of a fine-tuning towards the original: of packed weights, it is kept beside them or merged by packing again."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moeflow.arch import Family
from moeflow.engines import engine_of
from moeflow.methods.fit.choosing import Fitted
from moeflow.methods.fit.sizes import size
from moeflow.methods.records import Curves
from moeflow.methods.rewrite import link_all
from moeflow.model.layout import read_config
from moeflow.model.spec import LayerSpec, RestSpec
from moeflow.sizes import bytes_text
from moeflow.step import Artifact, Context, Spec, step

KEPT, MERGED = "kept", "merged"
WORDS = {KEPT: "fine-tuned, kept beside the packed weights", MERGED: "fine-tuned, and merged", "": "not fine-tuned"}


def _taken_spec(
    config: RestSpec, chosen: Any, measured: tuple[Any, ...], before: tuple[LayerSpec, ...], kept: tuple[LayerSpec, ...],
    *, ways: list[str], layers: list[int], engine: str,
) -> Spec:  # fmt: skip
    reads = chosen["bytes"] + sum(m["bytes"] for m in measured) + sum(f.headers for f in (*before, *kept))
    return Spec(chosen, reads=reads, writes=chosen["bytes"] + 200, memory=1 << 26)


@step("fit.taken", version=1, spec=_taken_spec)
def taken(
    context: Context, config: Artifact, chosen: Artifact, measured: tuple[Artifact, ...], before: tuple[Artifact, ...],
    kept: tuple[Artifact, ...], *, ways: list[str], layers: list[int], engine: str,
) -> None:  # fmt: skip
    """The choice, and what is taken of a fine-tuning of its model: of these `ways` the one that is closest to the original, if it
    is closer than the model without.

    `measured`: the divergence of each. `before` and `kept`: the layers with these numbers without the fine-tuning, and with what
    was trained beside the packed weights, which is taken only where the budget has room for it.
    """
    fitted, read = Fitted.read(chosen), read_config(config)
    tried = {way: Curves.read(curves).apart for way, curves in zip(ways, measured, strict=True)}
    runs = engine_of(engine, model_type=Family.of(read).arch.model_type)

    def taken_by(files: tuple[Artifact, ...]) -> float:
        return sum(size(f, fitted.unit, runs, read, i) for f, i in zip(files, layers, strict=True))

    more = taken_by(kept) - taken_by(before)
    over = max(0.0, fitted.size + more - fitted.budget) if KEPT in tried else 0.0
    open_to = {way: apart for way, apart in tried.items() if way != KEPT or not over}
    best = min(open_to, key=lambda way: open_to[way], default="")
    if best and fitted.before is not None and open_to[best] >= fitted.before:
        best = ""
    apart = open_to[best] if best else fitted.before
    replace(
        fitted, before=apart, recovered=best, tried=tried, over=over, size=fitted.size + more * (best == KEPT)
    ).write(context.out)  # fmt: skip
    context.note(_words(tried, over, best, fitted))


def _words(tried: Mapping[str, float], over: float, best: str, fitted: Fitted) -> str:
    each = "; ".join(f"{WORDS[way]} {apart:.6f}" for way, apart in tried.items())
    room = ""
    if over:
        amount = f"{over:,.0f} operations" if fitted.unit == "operations" else bytes_text(over)
        room = f"; to keep it, the budget would have to be {amount} larger"
    return f"KL to the original {fitted.before:.6f}; {each}{room}: {WORDS[best]}"


def _layer_spec(chosen: Any, every: tuple[LayerSpec | RestSpec, ...], *, ways: list[str]) -> Spec:
    return Spec(max(every, key=lambda f: f.nbytes), reads=0, writes=0, memory=1 << 24)


@step("fit.recovered", version=1, spec=_layer_spec)
def recovered(context: Context, chosen: Artifact, every: tuple[Artifact, ...], *, ways: list[str]) -> None:
    """A layer, or the rest, as the choice takes it: `every` has it without the fine-tuning, and then by each of these `ways`."""
    link_all(context, every[["", *ways].index(Fitted.read(chosen).recovered)])
