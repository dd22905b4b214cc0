"""Fine-tuning with DeepSpeed as a step like any other: a model and text go in, the trained layers come out.

The `Recipe` is part of the key. The `Gang` is not: it says how many processes there are, where they run, and what DeepSpeed divides
between them. A teacher's predictions, or states, are artifacts: no more of it than its head is ever in memory beside its student.
"""

from dataclasses import dataclass, replace
from typing import Any

from moeflow.arch import Family
from moeflow.methods.finetune.curve import Curve
from moeflow.methods.finetune.recipe import Recipe
from moeflow.methods.graph import HIDDEN
from moeflow.methods.records import Facts, read_json
from moeflow.methods.reports import row, write_report
from moeflow.model import operations
from moeflow.model.memory import on_device
from moeflow.model.packed import ADDED_IN, ADDED_OUT, PACKED, SCALE, packed_shapes
from moeflow.model.spec import (
    CheckpointSpec,
    HiddenSpec,
    LayerSpec,
    RestSpec,
    TensorTable,
    TokensSpec,
    header_bytes,
    precision,
    shapes_of,
)
from moeflow.options import plain
from moeflow.step import Artifact, Context, Spec, step

PREDICTIONS, TRAINING = "predictions.safetensors", "training.json"


@dataclass(frozen=True)
class PredictionsSpec:
    """A model's predictions for some sequences, cut to the likeliest tokens."""

    sequences: int
    length: int
    vocabulary: int
    top: int

    @property
    def nbytes(self) -> int:
        return self.sequences * self.length * (8 * self.top + 4) + 280


def _predictions_spec(rest: RestSpec, hidden: Any, *, top: int, dtype: str) -> Spec:
    states: HiddenSpec = getattr(hidden, "hidden", hidden)
    vocabulary = int(rest.config["vocab_size"])
    if not 1 <= top <= vocabulary:
        raise ValueError(f"top={top} must lie between 1 and the vocabulary's {vocabulary} tokens, or be 0 for all, without a file")
    out = PredictionsSpec(states.sequences, states.length, vocabulary, top)
    reads = rest.head_bytes + header_bytes(rest.tensors) + states.nbytes
    head, logits = rest.loaded(dtype, head=True), 16 * 1024 * vocabulary
    memory = 2 * rest.head_bytes + head + states.nbytes + 2 * out.nbytes + logits
    done = operations.head(rest, states.sequences * states.length, dtype)
    return Spec(out, reads=reads, writes=out.nbytes, operations=done, memory=memory, device=on_device(head + logits))


@step("finetune.predictions", version=1, spec=_predictions_spec, gpus=1)
def predictions(context: Context, rest: Artifact, hidden: Artifact, *, top: int, dtype: str) -> None:
    """Compute a model's predictions from the hidden states behind its last layer; writes `predictions.safetensors`."""
    from moeflow.methods.finetune.teacher import write_predictions

    write_predictions(rest, hidden.file(HIDDEN), context.out / PREDICTIONS, top=top, dtype=dtype, progress=context.progress)


def _train_spec(
    checkpoint: CheckpointSpec, data: TokensSpec, predictions: tuple[Any, ...], heldout: tuple[TokensSpec, ...],
    head: RestSpec | None = None, *, names: list[str], recipe: Recipe,
) -> Spec:  # fmt: skip
    taught = [getattr(p, "hidden", p) for p in predictions]
    reads = checkpoint.nbytes + checkpoint.others + 5 * data.tokens + sum(t.nbytes for t in taught)
    reads += 0 if head is None else head.head_bytes + header_bytes(head.tensors)
    # a layer with trained tensors is written whole, except for its routing file
    writes = checkpoint.headers if recipe.mode == "compressed_experts" else checkpoint.nbytes
    writes += checkpoint.one_rank * recipe.rank * recipe.beside
    tokens = recipe.steps * recipe.batch * data.length
    forwards = recipe.operations / 2  # in so many forward passes
    done = int(forwards * (2 * checkpoint.active + 4 * data.length * checkpoint.heads)) * tokens
    done += 0 if head is None else 2 * operations.head_numel(head) * tokens
    return Spec(
        {"bytes": 80 * recipe.steps + 2000}, reads=reads, writes=writes, memory=checkpoint.nbytes, compiles=True,
        packages=("deepspeed", "ninja"),
        operations={precision(checkpoint.config, recipe.dtype): done},
    )  # fmt: skip


@step("finetune.train", version=3, spec=_train_spec, gpus=1)
def train(
    context: Context, checkpoint: Artifact, data: Artifact, predictions: tuple[Artifact, ...] = (),
    heldout: tuple[Artifact, ...] = (), head: Artifact | None = None, *, names: list[str], recipe: Recipe,
) -> None:  # fmt: skip
    """Train a checkpoint; writes its trained layers, `layer-000/layer.safetensors` and so on, under the hub's names, and `rest/`.

    Also writes `training.json`, the course of the training (`curve.Curve`), and `deepspeed.json`, DeepSpeed's configuration.
    `predictions` are a teacher's on the data, shard by shard, or its states behind the last layer, of which `head`, its final norm
    and head, makes them; `names` are those of the held-out token matrices. Runs in each process of a gang, and outside one.
    Raises ValueError if no token is learned, and if the training diverges.
    """
    from moeflow.methods.finetune.loop import tune

    files = [p.file(PREDICTIONS if head is None else HIDDEN) for p in predictions]
    tune(context, checkpoint, data, files, head, dict(zip(names, heldout, strict=True)), recipe)


def _layer_spec(trained: Any, before: LayerSpec, *, layer: int, recipe: Recipe) -> Spec:
    return Spec(replace(before, tensors={**before.tensors, **added(before, recipe)}), memory=1 << 20)


def added(before: LayerSpec, recipe: Recipe) -> TensorTable:
    """The factors that a training leaves beside the packed matrices of a layer."""
    whole = packed_shapes(shapes_of(before.tensors), before.config)
    kinds = {name: Family.of(before.config).kind(name) for name in whole if name + PACKED in before.tensors}
    table: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in (n for n, kind in kinds.items() if recipe.beside and kind == "experts"):
        (rows, columns), dtype = whole[name], before.tensors[name + SCALE][0]
        rank = min(recipe.rank, rows, columns)
        if name + ADDED_OUT in before.tensors:
            rank += before.tensors[name + ADDED_OUT][1][1]
        table |= {name + ADDED_OUT: (dtype, (rows, rank)), name + ADDED_IN: (dtype, (rank, columns))}
    return table


@step("finetune.layer", version=1, spec=_layer_spec)
def layer(context: Context, trained: Artifact, before: Artifact, *, layer: int, recipe: Recipe) -> None:
    """One decoder layer: its trained files, its other files unchanged, and its facts. No tensor is copied."""
    _linked(context, trained, before)
    Facts.of(before).and_then("finetune.layer", **{"mode": recipe.mode, "loss": recipe.loss} | plain(recipe)).write(context.out)


def _rest_spec(trained: Any, before: RestSpec) -> Spec:
    return Spec(before, memory=1 << 20)


@step("finetune.rest", version=1, spec=_rest_spec)
def rest_of(context: Context, trained: Artifact, before: Artifact) -> None:
    """The trained embedding, final norm and head, and the small files unchanged. Nothing is copied."""
    _linked(context, trained, before)


def _linked(context: Context, trained: Artifact, before: Artifact) -> None:
    new = {name.rpartition("/")[2]: name for name in trained.names()}
    for name, file in new.items():
        context.link(trained, file, name)
    for name in before.names():
        if name not in (*new, Facts.FILE):
            context.link(before, name)


def _report_spec(trained: Any) -> Spec:
    return Spec(reads=trained["bytes"], writes=1600, memory=1 << 20, figures=("training_loss",))


@step("finetune.report", version=2, spec=_report_spec)
def report(context: Context, trained: Artifact) -> None:
    """Report the loss on the first and last batch, and on each held-out text before the training and for the kept state."""
    curve = Curve(**read_json(trained, TRAINING))
    rows = [row("training loss", curve.losses[0], curve.losses[-1], "nats/token", figure="training_loss", better="lower")]
    if curve.validations:
        before, kept = curve.validations[0]["losses"], curve.best_validation["losses"]
        rows += [row(f"loss while tuning ({name})", loss, kept[name], "nats/token") for name, loss in before.items()]
    note = f"{curve.trained:,} parameters trained in {curve.seconds:,.0f} s; the state behind step {curve.best} is kept"
    facts = {"trained_parameters": curve.trained, "seconds": curve.seconds, "steps": curve.steps, "kept_step": curve.best}
    write_report(context, "fine-tuning", rows, note=note, **facts)
