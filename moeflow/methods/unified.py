"""Slimming, trimming and low-rank experts in any order, each on a calibration of what the one before it left.

He et al., arXiv 2406.02500, for the first two; that a factor is slimmed like any other matrix is ours. Nothing is computed here.
"""

from collections.abc import Callable
from typing import Any

from moeflow.arch import arch_of
from moeflow.methods import calibrate, trim
from moeflow.methods import compress as compression
from moeflow.methods import slim as slimming
from moeflow.methods.calibrate import Calibration
from moeflow.methods.fetch import Model
from moeflow.step import Step


def compress(
    model: Model, tokens: Step, *, order: str = "slim,trim", trim: str = "layers", dropped: float = 0, slim: str = "awq",
    ratio: float = 0.25, group: int = 128, calibration: dict[str, Any], **options: Any,
) -> Model:  # fmt: skip
    """The model slimmed and trimmed, as a graph.

    `order`: stages with commas between them, "slim", "trim" and "decompose"; `trim`: "none", "experts" (`dropped` of a layer, on
    average), "layers" (so many MoE blocks) or "blocks" (so many decoder layers); `slim`: "none" or a method of `slim.METHODS`, with
    `group` and other `options` of `slim.slim`; "decompose" makes `ratio` of the experts' parameters go by low rank, at ranks that
    are multiples of `group`, or of 32 where that is 0; `calibration`: those of `calibrate.run`. Raises ValueError for what cannot
    work.
    """
    stages: dict[str, Callable[[Calibration], Model]] = {
        "slim": _slimmed(slim, options | {"group": group}),
        "trim": _trimmed(trim, dropped),
        "decompose": lambda seen: compression.decompose(seen, ratio=ratio, multiple=group or 32),
    }
    for name in order.split(","):
        if name not in stages:
            raise ValueError(f"order={order!r}: {name!r} is no stage; write slim,trim or trim,slim or decompose,slim")
        model = stages[name](calibrate.run(model, tokens, **calibration, between=trim == "blocks"))
    return model


def _slimmed(method: str, options: dict[str, Any]) -> Callable[[Calibration], Model]:
    if method == "none":
        return lambda seen: seen.model
    return lambda seen: slimming.slim(seen, method=method, **options)


def _trimmed(name: str, dropped: float) -> Callable[[Calibration], Model]:
    if name not in TRIMS:
        raise ValueError(f"trim={name!r} is not known; choose one of {', '.join(TRIMS)}")
    if name in ("layers", "blocks") and dropped != int(dropped):
        raise ValueError(f"dropped={dropped} {name} is no whole number")
    return lambda seen: TRIMS[name](seen, dropped)


def _experts(seen: Calibration, dropped: float) -> Model:
    model = seen.model
    counts = [model.layers[i].spec.output.experts for i in model.moe_layers]
    least = arch_of(model.config).top_k(model.config)
    return trim.expert_drop(seen, keep=sum(counts) / len(counts) - dropped, least=least)


TRIMS: dict[str, Callable[[Calibration, float], Model]] = {
    "none": lambda seen, dropped: seen.model,
    "experts": _experts,
    "layers": lambda seen, dropped: trim.layer_drop(seen, drop=int(dropped)),
    "blocks": lambda seen, dropped: trim.block_drop(seen, drop=int(dropped)),
}
"""What is taken out, by name."""
