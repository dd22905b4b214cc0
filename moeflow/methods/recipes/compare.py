"""A compressed model compared with its original: every report of `moeflow.methods.evaluate`, on each held-out text."""

import re
from typing import Any

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.calibrate.steps import hidden_states
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.evaluate.steps import here, layers, quality, reach, size, speed
from moeflow.methods.graph import Calibration, Model, Pass
from moeflow.step import Step


def compare(
    calibration: Calibration, compressed: Model, *, heldout: data.Texts, sequences: int, length: int, seed: int = 0
) -> tuple[Step, ...]:
    """Reports on `compressed` beside the model that was calibrated: size, quality on each held-out text, speed.

    A model without a tokenizer cannot read text: its quality is measured on the calibration tokens instead, and the report says so.
    """
    original = calibration.model
    both = checkpoint.checkpoint_of(original), checkpoint.checkpoint_of(compressed)
    plan: list[tuple[str, Step, tuple[Step, ...], str]] = []
    if original.has_tokenizer:
        for text in heldout.each():
            matrix = data.tokens(text, original, sequences=sequences, length=length, seed=seed, bos=False)
            plan.append((_name(text.entries()[0].source), matrix, _hidden(original, matrix, calibration), ""))
    else:
        note = "the model has no tokenizer: held-out text is left out, the loss on the token matrix stands for it"
        plan.append(("token matrix", calibration.tokens, calibration.ends, note))
    chosen = [c for c in compressed.choices if "keep" in c.spec.output]
    zeros = sorted({s.slimmed_by for layer in compressed.layers if (s := layer.spec.output).sparse})
    reports = [size(*both, zeros=zeros), *([layers(*chosen)] if chosen else [])]
    for name, matrix, ends, note in plan:
        theirs, seen = _hidden(compressed, matrix, calibration), {}
        if compressed.does_with_fewer:
            passed = calibrate.run(compressed, matrix, _options(calibration), inputs=False)
            theirs, seen = passed.ends, passed.observed
        reports.append(
            quality(
                original.rest,
                compressed.rest,
                matrix,
                *ends,
                *theirs,
                firsts=len(ends),
                name=name,
                note=note,
                dtype=calibration.dtype,
            )
        )
        if seen:
            reports.append(reach(original.essential, *(p for parts in seen.values() for p in parts), layers=list(seen), name=name))
    return (*reports, speed(*both, machine=here(), length=length))


def _options(calibration: Calibration) -> Pass:
    return Pass(calibration.batch, shard=8 * calibration.batch, dtype=calibration.passed.dtype)


def _hidden(model: Model, matrix: Step, calibration: Calibration) -> tuple[Step, ...]:
    return hidden_states(model, matrix, _options(calibration))


def _name(source: Any) -> str:
    """What a text is called in a report: its file, with the folder where that says more ("wikitext-2-raw-v1/test")."""
    path = (source.files[0].name if len(source.files) == 1 else source.uri).rstrip("/").removeprefix("python:")
    stem = re.sub(r"-\d+-of-\d+$", "", path.rsplit("/", 1)[-1].split("?")[0].split(".")[0])
    return f"{path.split('/')[-2]}/{stem}" if stem in ("train", "test", "validation") and "/" in path else stem
