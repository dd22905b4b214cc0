"""Slimming, trimming and low-rank experts in any order, each calibrated on the result of the one before.

He et al., arXiv 2406.02500, for the first two; slimming a factor like any other matrix is ours. Only builds graphs.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.finetune.recipe import Gang
from moeflow.methods.graph import Calibration, Model, Pass
from moeflow.methods.predict.steps import predicted
from moeflow.methods.recipes import moei2
from moeflow.methods.recipes.sequence import in_sequence
from moeflow.methods.recipes.tune import FineTuning, Tuned, tuned
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.steps import slimmed
from moeflow.methods.trim.steps import TRIM_KINDS, Trimming
from moeflow.methods.trim.steps import trim as take_out
from moeflow.step import Part, Step

TUNE = "tune"
"""The name of the stage that fine-tunes; it needs no calibration."""


def slim(calibration: Calibration, how: Slimming) -> Model:
    """Build the graph of the calibrated model with sparse or quantized experts.

    With `inputs="parallel"` one calibration serves all layers, which are slimmed in parallel; with "sequential" each layer sees the
    output of the slimmed layers before it, and down that of slimmed gate and up. In low-rank experts each factor is slimmed, the
    second on the output of the slimmed first; `group` must divide the ranks. Raises ValueError for options that cannot work.
    """
    calibration.check_states(f"slim={how.method}")
    model, dtype = calibration.model, calibration.dtype

    whole = how.target == "model"
    if whole and not calibration.beside:
        raise ValueError("target=model compares what blocks are added to: calibrate with beside, the sequences of a shard")

    def layer(at: int, file: Step, recorded: tuple[Part, ...]) -> Step:
        beside = calibration.beside[at] if whole else ()
        return slimmed(model.essential, file, recorded, beside, at=at, how=how, dtype=dtype, in_turn=True)

    if how.inputs == "sequential":
        return model.with_layers(in_sequence(calibration, layer, statistics=False, beside=whole)[0])
    return model.with_layers({i: slimmed(*calibration.of(i), at=i, how=how, dtype=dtype) for i in calibration.observed})


def compress(
    model: Model, tokens: Step, passed: Pass, *, order: str = "slim,trim",
    slim: Slimming | None = None, trim: Trimming | None = None, decompose: Decomposition | None = None,
    tune: FineTuning | None = None, gang: Gang = Gang(),
) -> Tuned:  # fmt: skip
    """Build the graph that slims, trims, decomposes and fine-tunes the model in this `order`.

    `order`: stages separated by commas; a stage whose options are None is left out. `passed`: how each stage is calibrated, on the
    result of the one before. Raises ValueError for options that cannot work.
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
            needs: Mapping[str, Any] = TRIM_KINDS[how.what].needs if isinstance(how, Trimming) else {}
            if isinstance(how, Slimming) and how.target == "model":
                needs = {"beside": passed.shard}
            calibration = predicted(calibrate.run(made.model, tokens, passed, **needs))
            made = replace(made, model=STAGES[name](calibration, how))
    return made


STAGES: dict[str, Callable[[Calibration, Any], Model]] = {"slim": slim, "trim": take_out, "decompose": moei2.decompose}
"""The stages of a compression, by their names in its order: from a calibration and the stage's options to the model."""
