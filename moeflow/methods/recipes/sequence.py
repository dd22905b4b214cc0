"""Rewrite a model layer by layer, each calibrated behind those that are rewritten already. Only builds graphs."""

from collections.abc import Callable
from typing import Any

from moeflow.methods.calibrate.steps import behind, inputs
from moeflow.methods.graph import Calibration
from moeflow.model.layout import file_of
from moeflow.model.spec import Recording
from moeflow.step import Part, Step

Rewrite = Callable[[int, Step, tuple[Part, ...]], Step]
"""Takes a layer's number, its file and what every shard recorded in it; returns the file that replaces it."""


def in_sequence(
    calibration: Calibration, rewrite: Rewrite, *, statistics: bool = True, beside: bool = False
) -> tuple[dict[int, Step], tuple[Step, ...]]:
    """Rewrite the MoE layers one after the other; each is observed behind the layers that are already rewritten.

    NAEE calls this progressive pruning (Table 6 of the paper); GPTQ and SparseGPT treat a model this way. Without `statistics`
    only the inputs of the MoE blocks are recorded, for which no layer's experts are run twice; with `beside` also what the blocks'
    outputs are added to. Returns the rewritten layers, and
    the states of every shard behind the last layer of the model with them.
    """
    model, passed = calibration.model, calibration.passed
    rewritten: dict[int, Step] = {}
    hidden = calibration.starts
    last = max(calibration.observed, default=0)

    def observed(i: int, layer: Step) -> tuple[Part, ...]:
        if statistics:
            again = behind(model, passed, hidden, i, (layer,), Recording(calibration.recorded))
        else:
            how: dict[str, Any] = {"at": i, "recorded": calibration.recorded, "beside": beside, "dtype": passed.dtype}
            again = tuple(passed.bounded(inputs(model.essential, before, layer, **how)) for before in hidden)
        return tuple(h.part(file_of(i)) for h in again)

    for i, layer in enumerate(model.layers[: last + 1]):
        if i in calibration.observed:
            known = statistics and not rewritten
            layer = rewritten[i] = rewrite(i, layer, calibration.observed[i] if known else observed(i, layer))
        hidden = behind(model, passed, hidden, i, (layer, *model.layers[i + 1 :]) if i == last else (layer,))
    return rewritten, hidden
