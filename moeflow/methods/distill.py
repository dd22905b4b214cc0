"""What the original model predicts for every token of some data, as artifacts: a teacher never in memory beside its student."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moeflow.methods.calibrate import HIDDEN, hidden_states
from moeflow.methods.fetch import Model
from moeflow.model.spec import HiddenSpec, RestSpec, header_bytes
from moeflow.step import Artifact, Context, Spec, Step, step, upstream

PREDICTIONS = "predictions.safetensors"


@dataclass(frozen=True)
class PredictionsSpec:
    """A model's predictions for some sequences, cut to its likeliest tokens."""

    sequences: int
    length: int
    vocabulary: int
    top: int

    @property
    def nbytes(self) -> int:
        return self.sequences * self.length * (8 * self.top + 4) + 280


def teacher(
    original: Model, data: Step, *, top: int = 64, batch: int = 8, shard: int = 32, stage: int = 8, dtype: str = "auto"
) -> tuple[Step, ...]:
    """What `original` predicts for the tokens of `data`: the `top` likeliest tokens of each position, and the rest as one.

    One step for each shard of `shard` sequences, run in stages of `stage` layers, `batch` sequences together; 8 bytes for each
    token that is kept. As it is streamed layer by layer, the teacher may be larger than any machine's memory.
    """
    ends = hidden_states(original, data, batch=batch, shard=shard, stage=stage, dtype=dtype)
    return tuple(predictions(original.rest, end, top=top, dtype=dtype) for end in ends)


def teachers(loss: str) -> Callable[..., tuple[Step, ...]]:
    """`teacher` where this loss (of `recipe.LOSSES`) needs one, and otherwise a function that gives none."""
    return (lambda original, data, **options: ()) if loss == "lm" else teacher


def check(given: tuple[Step, ...], data: Step, vocabulary: int) -> None:
    """Raise ValueError where these are no predictions for these data and this vocabulary."""
    specs = [s.spec.output for s in given]
    if not all(isinstance(spec, PredictionsSpec) for spec in specs):
        raise ValueError("the teacher's steps are not those that distill.teacher() makes; pass what it returns")
    if sum(spec.sequences for spec in specs) != data.spec.output.sequences or any(
        data.key not in {s.key for s in upstream([one])} for one in given
    ):
        raise ValueError(
            "the teacher has read other data; make it with distill.teacher(original, data) of the data of the training"
        )
    if specs[0].vocabulary != vocabulary:
        raise ValueError(
            f"the teacher's vocabulary has {specs[0].vocabulary} tokens, the model's {vocabulary}; choose one of the same tokenizer"
        )


def _predictions_spec(rest: RestSpec, hidden: Any, *, top: int, dtype: str) -> Spec:
    states: HiddenSpec = getattr(hidden, "hidden", hidden)
    vocabulary = int(rest.config["vocab_size"])
    if not 1 <= top <= vocabulary:
        raise ValueError(f"top={top} must lie between 1 and the vocabulary's {vocabulary} tokens")
    out = PredictionsSpec(states.sequences, states.length, vocabulary, top)
    reads = rest.head_bytes + header_bytes(rest.tensors) + states.nbytes
    memory = 3 * rest.head_bytes + states.nbytes + 2 * out.nbytes + 16 * 1024 * vocabulary
    return Spec(out, reads=reads, writes=out.nbytes, memory=memory)


@step("distill.predictions", version=1, spec=_predictions_spec, gpus=1)
def predictions(context: Context, rest: Artifact, hidden: Artifact, *, top: int, dtype: str) -> None:
    """What a model makes of the hidden states behind its last layer: `predictions.safetensors`."""
    from moeflow.methods.distilling import write_predictions

    write_predictions(rest, hidden.file(HIDDEN), context.out / PREDICTIONS, top=top, dtype=dtype, progress=context.progress)
