"""Slimming, trimming and low-rank experts in any order, each on a calibration of what the one before it left.

He et al., arXiv 2406.02500, for the first two; that a factor is slimmed like any other matrix is ours. Only graphs are built here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.graph import Calibration, Model, Pass
from moeflow.methods.recipes import moei2
from moeflow.methods.records import SPARSE
from moeflow.methods.slim.steps import INPUTS, QUANTIZING, WITHOUT_TOKENS, divided
from moeflow.methods.trim.steps import Trimming
from moeflow.methods.trim.steps import trim as take_out
from moeflow.step import Step


def slim(
    calibration: Calibration, *, method: str, pattern: str = "2:4", bits: int = 4, group: int = 128, symmetric: bool = True,
    order: bool = False, damp: float = 0.01, block: int = 128, least: int = 1, policy: str = "",
    shared: bool = False, inputs: str = "parallel", packed: bool = True, tasks: int = 1,
) -> Model:  # fmt: skip
    """The calibrated model with sparse or quantized experts, as a graph.

    `method`: "magnitude", "wanda" and "sparsegpt" leave zeros of a `pattern` ("0.5", "2:4"); "round_to_nearest", "gptq" and "awq"
    round to `bits`, one scale for `group` inputs (0: a row), with `order` by activation (GPTQ). `damp` and `block` are those of
    SparseGPT and GPTQ. An expert that fewer than `least` recorded tokens reach is treated by its weights alone (`policy`
    "magnitude" or "round_to_nearest", as the method is of one kind or the other) or stays whole ("keep"). `shared`: shared
    experts are treated, too. `inputs`: "parallel", every layer sees what the dense model gives it, one calibration serves all and
    layers are treated beside each other; "sequential", what the slimmed layers before it do, and down what slimmed gate and up
    do. `packed`: quantized experts are written packed, as transformers and vLLM read them; otherwise as the weights that the
    codes stand for. `tasks`: between how many a layer's experts are divided, with the same result; not for AWQ, whose experts
    share a scale. Of experts that are low-rank already, GPTQ and rounding treat each factor, the second by what the first, as it
    has become, gives it; `group` has to divide the ranks. Raises ValueError for what cannot work.
    """
    if inputs not in INPUTS:
        raise ValueError(f"inputs={inputs!r} is not known; choose one of {', '.join(INPUTS)}")
    how = {
        "method": method,
        "pattern": pattern if method in SPARSE else "",
        "bits": bits if method in QUANTIZING else 0,
        "group": group if method in QUANTIZING else 0,
        "symmetric": symmetric,
        "order": order,
        "damp": damp,
        "block": block,
        "least": least,
        "policy": policy or WITHOUT_TOKENS.get(method, ""),
        "shared": shared,
        "chained": inputs == "sequential",
        "packed": packed and method in QUANTIZING,
        "dtype": calibration.dtype,
    }
    model = calibration.model
    if inputs == "parallel":
        return model.with_layers(
            {i: divided(model.essential, model.layers[i], seen, i, how, tasks) for i, seen in calibration.observed.items()}
        )
    return _slim_in_sequence(calibration, how, tasks)


def _slim_in_sequence(calibration: Calibration, how: dict[str, Any], tasks: int) -> Model:
    model = calibration.model
    return model.with_layers(
        calibrate.in_sequence(calibration, lambda i, layer, seen: divided(model.essential, layer, seen, i, how, tasks))
    )


def compress(
    model: Model, tokens: Step, *, order: str = "slim,trim", trim: Trimming | None, slim: str = "awq", ratio: float = 0.25,
    group: int = 128, calibration: Pass, **options: Any,
) -> Model:  # fmt: skip
    """The model slimmed, trimmed and decomposed, as a graph; each stage is calibrated on what the one before it left.

    `order`: stages with commas between them, "slim", "trim" and "decompose"; `trim`: what is taken out, None: nothing; `slim`:
    "none" or a method of `slim.METHODS`, with `group` and other `options` of `slim.slim`; "decompose" makes `ratio` of the experts'
    parameters go by low rank, at ranks that are multiples of `group`, or of 32 where that is 0; `calibration`: how
    each stage is calibrated. Raises ValueError for what cannot work.
    """
    stages: dict[str, tuple[Callable[[Calibration], Model], dict[str, bool]]] = {
        "decompose": (lambda seen: moei2.decompose(seen, ratio=ratio, multiple=group or 32), {})
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
    return lambda seen: slim(seen, method=method, **options)
