"""Slimming, trimming and low-rank experts in any order, each on a calibration of what the one before it left.

He et al., arXiv 2406.02500, for the first two; that a factor is slimmed like any other matrix is ours. Only graphs are built here.
"""

from collections.abc import Callable
from typing import Any

from moeflow.arch import Family
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.graph import Calibration, Model, Pass
from moeflow.methods.recipes import moei2
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.steps import slimmed
from moeflow.methods.trim import steps as trim
from moeflow.step import Part, Step


def slim(calibration: Calibration, how: Slimming) -> Model:
    """The calibrated model with sparse or quantized experts, as a graph.

    With `inputs="parallel"` one calibration serves all layers, which are treated beside each other; with "sequential" each layer
    sees what the slimmed layers before it give, and down what slimmed gate and up give. Of low-rank experts each factor is treated,
    the second by what the first, as it has become, gives it; `group` has to divide the ranks. Raises ValueError for what cannot
    cannot work.
    """
    model = calibration.model

    def layer(at: int, given: Step, seen: tuple[Step | Part, ...]) -> Step:
        return slimmed(model.essential, given, seen, at=at, how=how, dtype=calibration.dtype)

    if how.inputs == "sequential":
        return model.with_layers(calibrate.in_sequence(calibration, layer))
    return model.with_layers({at: layer(at, model.layers[at], seen) for at, seen in calibration.observed.items()})


def compress(
    model: Model, tokens: Step, *, order: str = "slim,trim", trim: str = "layers", dropped: float = 0, slim: str = "awq",
    ratio: float = 0.25, group: int = 128, calibration: Pass, **options: Any,
) -> Model:  # fmt: skip
    """The model slimmed and trimmed, as a graph.

    `order`: stages with commas between them, "slim", "trim" and "decompose"; `trim`: "none", "experts" (`dropped` of a layer, on
    average), "layers" (so many MoE blocks) or "blocks" (so many decoder layers); `slim`: "none" or a name of `METHODS`, with
    `group` and other fields of `Slimming`; "decompose" makes `ratio` of the experts' parameters go by low rank, at ranks that
    are multiples of `group`, or of 32 where that is 0; `calibration`: how each stage is calibrated. Raises ValueError for what
    cannot work.
    """
    stages: dict[str, Callable[[Calibration], Model]] = {
        "slim": _slimmed(slim, options | {"group": group}),
        "trim": _trimmed(trim, dropped),
        "decompose": lambda seen: moei2.decompose(seen, Decomposition(ratio=ratio, multiple=group or 32)),
    }
    for name in order.split(","):
        if name not in stages:
            raise ValueError(f"order={order!r}: {name!r} is no stage; write slim,trim or trim,slim or decompose,slim")
        model = stages[name](calibrate.run(model, tokens, calibration, between=trim == "blocks"))
    return model


def _slimmed(method: str, options: dict[str, Any]) -> Callable[[Calibration], Model]:
    if method == "none":
        return lambda seen: seen.model
    how = Slimming(method, **options)
    return lambda seen: slim(seen, how)


def _trimmed(name: str, dropped: float) -> Callable[[Calibration], Model]:
    if name not in TRIMS:
        raise ValueError(f"trim={name!r} is not known; choose one of {', '.join(TRIMS)}")
    if name in ("layers", "blocks") and dropped != int(dropped):
        raise ValueError(f"dropped={dropped} {name} is no whole number")
    return lambda seen: TRIMS[name](seen, dropped)


def _experts(seen: Calibration, dropped: float) -> Model:
    model = seen.model
    counts = [model.layers[i].spec.output.experts for i in model.moe_layers]
    least = Family.of(model.config).top_k
    return trim.expert_drop(seen, keep=sum(counts) / len(counts) - dropped, least=least)


TRIMS: dict[str, Callable[[Calibration, float], Model]] = {
    "none": lambda seen, dropped: seen.model,
    "experts": _experts,
    "layers": lambda seen, dropped: trim.layer_drop(seen, drop=int(dropped)),
    "blocks": lambda seen, dropped: trim.block_drop(seen, drop=int(dropped)),
}
"""What is taken out, by name."""
