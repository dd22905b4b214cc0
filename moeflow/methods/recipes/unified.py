"""Slimming, trimming and low-rank experts in any order, each on a calibration of what the one before it left.

He et al., arXiv 2406.02500, for the first two; that a factor is slimmed like any other matrix is ours. Only graphs are built here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.finetune.recipe import Gang
from moeflow.methods.graph import Calibration, Model, Pass
from moeflow.methods.recipes import moei2
from moeflow.methods.recipes.tune import FineTuning, Tuned, tuned
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.steps import slimmed
from moeflow.methods.trim.steps import TRIM_KINDS, Trimming
from moeflow.methods.trim.steps import trim as take_out
from moeflow.step import Part, Step

TUNE = "tune"
"""The stage that fine-tunes; it needs no calibration."""


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
    model: Model, tokens: Step, passed: Pass, *, order: str = "slim,trim",
    slim: Slimming | None = None, trim: Trimming | None = None, decompose: Decomposition | None = None,
    tune: FineTuning | None = None, gang: Gang = Gang(),
) -> Tuned:  # fmt: skip
    """The model slimmed, trimmed, decomposed and fine-tuned in this `order`, as a graph.

    `order`: stages with commas between them; a stage that is None is left out. `passed`: how each stage is calibrated, on what the
    one before it left. Raises ValueError for what cannot work.
    """
    options = {"slim": slim, "trim": trim, "decompose": decompose}
    names, made = order.split(","), Tuned(model, None, ())
    if tune is not None and TUNE not in names:
        raise ValueError(f"order={order!r} has no stage {TUNE!r}; say where the model is fine-tuned, as in order=trim,tune,slim")
    for name in names:
        if name == TUNE:
            then = tuned(made.model, model, tune, gang, passed)
            made = replace(then, reports=made.reports + then.reports)
            continue
        if name not in STAGES:
            raise ValueError(
                f"order={order!r}: {name!r} is no stage; write slim,trim or trim,slim or decompose,slim or trim,tune,slim"
            )
        if (how := options[name]) is not None:
            stage = STAGES[name]
            made = replace(made, model=stage.graph(calibrate.run(made.model, tokens, passed, **stage.needs(how)), how))
    return made


@dataclass(frozen=True)
class Stage:
    """One row of the table of stages."""

    graph: Callable[[Calibration, Any], Model]
    """From a calibration and the stage's options to the compressed model."""
    needs: Callable[[Any], Mapping[str, bool]]
    """What it reads of the calibration, by its options: the switches of `calibrate.run`."""


STAGES = {
    "slim": Stage(slim, lambda how: {}),
    "trim": Stage(take_out, lambda how: TRIM_KINDS[how.what].needs),
    "decompose": Stage(moei2.decompose, lambda how: {}),
}
"""The stages of a compression, by the names that its order gives them."""
