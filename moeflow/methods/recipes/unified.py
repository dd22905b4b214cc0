"""Slimming, trimming and low-rank experts in any order, each on a calibration of what the one before it left.

He et al., arXiv 2406.02500, for the first two; that a factor is slimmed like any other matrix is ours. Only graphs are built here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.graph import Calibration, Model, Pass
from moeflow.methods.recipes import moei2
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.steps import slimmed
from moeflow.methods.trim.steps import Trimming
from moeflow.methods.trim.steps import trim as take_out
from moeflow.step import Part, Step


def slim(calibration: Calibration, how: Slimming) -> Model:
    """The calibrated model with sparse or quantized experts, as a graph.

    With `inputs="parallel"` one calibration serves all layers, which are treated beside each other; with "sequential" each layer
    sees what the slimmed layers before it give, and down what slimmed gate and up give. Of low-rank experts each factor is treated,
    the second by what the first, as it has become, gives it; `group` has to divide the ranks. Raises ValueError for what cannot
    work.
    """
    model = calibration.model

    def layer(at: int, given: Step, seen: tuple[Step | Part, ...]) -> Step:
        return slimmed(model.essential, given, seen, at=at, how=how, dtype=calibration.dtype)

    if how.inputs == "sequential":
        return model.with_layers(calibrate.in_sequence(calibration, layer))
    return model.with_layers({at: layer(at, model.layers[at], seen) for at, seen in calibration.observed.items()})


def compress(
    model: Model, tokens: Step, *, order: str = "slim,trim", trim: Trimming | None, slim: str = "awq", ratio: float = 0.25,
    group: int = 128, calibration: Pass, **options: Any,
) -> Model:  # fmt: skip
    """The model slimmed, trimmed and decomposed, as a graph; each stage is calibrated on what the one before it left.

    `order`: stages with commas between them, "slim", "trim" and "decompose"; `trim`: what is taken out, None: nothing; `slim`:
    "none" or a name of `METHODS`, with `group` and other fields of `Slimming`; "decompose" makes `ratio` of the experts'
    parameters go by low rank, at ranks that are multiples of `group`, or of 32 where that is 0; `calibration`: how
    each stage is calibrated. Raises ValueError for what cannot work.
    """
    stages: dict[str, tuple[Callable[[Calibration], Model], dict[str, bool]]] = {
        "decompose": (lambda seen: moei2.decompose(seen, Decomposition(ratio=ratio, multiple=group or 32)), {})
    }
    if slim != "none":
        stages["slim"] = (_slimmed(slim, options | {"group": group}), {})
    if trim is not None:
        stages["trim"] = (partial(take_out, how=trim), NEEDS[trim.what])
    for name in order.split(","):
        if name not in ("slim", "trim", "decompose"):
            raise ValueError(f"order={order!r}: {name!r} is no stage; write slim,trim or trim,slim or decompose,slim")
        if name in stages:
            compressed, needs = stages[name]
            model = compressed(calibrate.run(model, tokens, calibration, **needs))
    return model


NEEDS: dict[str, dict[str, bool]] = {
    "experts": {"inputs": False},
    "moe_blocks": {"inputs": False},
    "decoder_layers": {"inputs": False, "between": True},
}
"""What a trimming reads of a calibration (`calibrate.run`): statistics only, and for decoder layers the states before each."""


def _slimmed(method: str, options: dict[str, Any]) -> Callable[[Calibration], Model]:
    how = Slimming(method, **options)
    return lambda seen: slim(seen, how)
