"""Fine-tuning with DeepSpeed as a step like any other: a model and text in, the layers that were trained out.

What is trained and towards what is part of the key; how many processes do it, where, and what DeepSpeed divides between them is not
(`Gang`). The teacher's predictions are artifacts, so that it is never in memory beside its student.
"""

import json
from dataclasses import dataclass
from typing import Any

from moeflow.methods.finetune.recipe import Recipe
from moeflow.methods.graph import HIDDEN
from moeflow.methods.records import Facts
from moeflow.methods.reports import row, write_report
from moeflow.model.spec import CheckpointSpec, HiddenSpec, LayerSpec, RestSpec, TokensSpec, header_bytes
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


def check_teacher(given: tuple[Step, ...], data: Step, vocabulary: int) -> None:
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


@step("finetune.predictions", version=1, spec=_predictions_spec, gpus=1)
def predictions(context: Context, rest: Artifact, hidden: Artifact, *, top: int, dtype: str) -> None:
    """What a model makes of the hidden states behind its last layer: `predictions.safetensors`."""

    from moeflow.methods.finetune.teacher import write_predictions

    write_predictions(rest, hidden.file(HIDDEN), context.out / PREDICTIONS, top=top, dtype=dtype, progress=context.progress)


TRAINING = "training.json"


def _train_spec(checkpoint: CheckpointSpec, data: TokensSpec, *rest: Any, batch: int, **recipe: Any) -> Spec:
    reads = checkpoint.nbytes + checkpoint.others + 5 * data.tokens
    # a layer of which something is trained is written whole, but for what stands beside its experts
    writes = checkpoint.headers if recipe["mode"] == "compressed_experts" else checkpoint.nbytes
    return Spec({"bytes": 80 * recipe["steps"] + 2000}, reads=reads, writes=writes, memory=checkpoint.nbytes)


@step("finetune.train", version=1, spec=_train_spec, gpus=1)
def train(
    context: Context, checkpoint: Artifact, data: Artifact, *rest: Artifact, teachers: int, validation: list[str],
    mode: str, mix: float, targets: list[str], rank: int, alpha: float, steps: int, batch: int, rate: float, warmup: int,
    floor: float, decay: float, clip: float, betas: list[float], epsilon: float, dtype: str, every: int, keep: str, seed: int,
    sparse: bool,
) -> None:  # fmt: skip
    """What was trained of a checkpoint: `layer-000/layer.safetensors` and so on, whole layers under the hub's names, `rest/`.

    Beside them `training.json`, the course of the training (`curve.Curve`), and `deepspeed.json`, what DeepSpeed was told. `rest`:
    the predictions of a teacher in `teachers` files, then one token matrix for each name of `validation`. Runs in each process of a
    gang, and outside one. Raises ValueError where nothing is to be predicted, and where the training diverges.
    """

    from moeflow.methods.finetune.loop import tune as run

    recipe = Recipe(
        mode=mode, mix=mix, targets=tuple(targets), rank=rank, alpha=alpha, steps=steps, batch=batch, rate=rate, warmup=warmup,
        floor=floor, decay=decay, clip=clip, betas=(betas[0], betas[1]), epsilon=epsilon, dtype=dtype, every=every, keep=keep,
        seed=seed, sparse=sparse,
    )  # fmt: skip
    taught = [artifact.file(PREDICTIONS) for artifact in rest[:teachers]]
    run(context, checkpoint, data, taught, dict(zip(validation, rest[teachers:], strict=True)), recipe)


def _layer_spec(trained: Any, given: LayerSpec, *, layer: int, mode: str) -> Spec:
    return Spec(given, memory=1 << 20)


@step("finetune.layer", version=1, spec=_layer_spec)
def layer(context: Context, trained: Artifact, given: Artifact, *, layer: int, mode: str) -> None:
    """One decoder layer as it was trained in this `mode`, and what else the layer's files were before; no weight moves."""
    _linked(context, trained, given)
    Facts.of(given).and_then("finetune.layer", mode=mode).write(context.out)


def _rest_spec(trained: Any, given: RestSpec) -> Spec:
    return Spec(given, memory=1 << 20)


@step("finetune.rest", version=1, spec=_rest_spec)
def rest_of(context: Context, trained: Artifact, given: Artifact) -> None:
    """Embedding, final norm and head as they were trained, with the small files of before; no byte moves."""
    _linked(context, trained, given)


def _linked(context: Context, trained: Artifact, given: Artifact) -> None:
    new = {name.rpartition("/")[2]: name for name in trained.names()}
    for name, file in new.items():
        context.link(trained, file, name)
    for name in given.names():
        if name not in new and name != Facts.FILE:
            context.link(given, name)


def _report_spec(trained: Any) -> Spec:
    return Spec(reads=trained["bytes"], writes=1500, memory=1 << 20)


@step("finetune.report", version=1, spec=_report_spec)
def report(context: Context, trained: Artifact) -> None:
    """What the training did to the loss: of its first and last batch, and on each held-out text before and as it was kept."""
    told = json.loads(trained.read(TRAINING, 0, trained.size(TRAINING)))
    rows = [row("training loss", told["losses"][0], told["losses"][-1], "nats/token")]
    if told["validations"]:
        first, kept = told["validations"][0], next(v for v in told["validations"] if v["steps"] == told["best"])
        both = {name: (first["losses"][name], kept["losses"][name]) for name in first["losses"]}
        rows += [row(f"loss while tuning ({name})", *losses, "nats/token") for name, losses in both.items()]
    facts = {"trained_parameters": told["trained"], "seconds": told["seconds"]}
    facts |= {"steps": len(told["losses"]), "kept_step": told["best"]}
    note = f"{told['trained']:,} parameters trained in {told['seconds']:,.0f} s; the state behind step {told['best']} is kept"
    write_report(context, "fine-tuning", rows, notes=[note], **facts)
