"""Fine-tune a model on text, towards the text, a teacher's predictions, or both. Only builds graphs."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from moeflow.arch import Config, Family
from moeflow.methods.calibrate.steps import hidden_states
from moeflow.methods.checkpoint.steps import text_model_of, told_model_of
from moeflow.methods.data.steps import Examples, examples, tokens
from moeflow.methods.finetune import deepspeed_config
from moeflow.methods.finetune import steps as finetune
from moeflow.methods.finetune.memory import Work, exchanged, fitted
from moeflow.methods.finetune.recipe import Gang, Packed, Recipe
from moeflow.methods.finetune.targets import trained_in
from moeflow.methods.generate.steps import alone, partly
from moeflow.methods.graph import Model, Pass, Sample
from moeflow.model.packed import PACKED, unpacked_shapes
from moeflow.model.spec import LayerSpec, TokensSpec, precision, shapes_of
from moeflow.sources import NamesFiles, Texts
from moeflow.step import Step

GENERATED, LOADED = 0.5, 64_000_000_000
"""The part of the rows that a model writes itself to be recovered on where nothing is said, if its weights take at most so many
bytes in memory."""

UNSEEN = 8192
"""Tokens that it writes beside, by which is judged what was trained."""


@dataclass(frozen=True)
class Tuned:
    """A model, the step that fine-tuned it (None if none did), and a report on how that went."""

    model: Model
    trained: Step | None
    reports: tuple[Step, ...]
    unseen: Step | None = None
    """Tokens that the original wrote and nothing was trained on, if it writes any."""


@dataclass(frozen=True)
class FineTuning(Recipe, NamesFiles):
    """The options of a fine-tuning: what is trained, how, and on which text."""

    text: str = "alpaca"
    """The training text: the name of a data set (alpaca, metamathqa, tulu3), or URI#prompt+response, URI#messages, URI#text."""
    rows: int = 4096
    """Sequences of the text; it is read again if it is too small."""
    length: int = 2048
    """Tokens of a sequence."""
    bos: bool | None = None
    """A beginning-of-sequence token before each example; none: as of `Sample`."""
    deepspeed: str = ""
    """The path of a DeepSpeed configuration, which overrides recipe and gang."""

    def check_files(self) -> None:
        Texts(self.text).check_local()
        deepspeed_config.read(self.deepspeed or None)

    @property
    def recipe(self) -> Recipe:
        return Recipe(**{f.name: getattr(self, f.name) for f in fields(Recipe)})

    def data(self, model: Model) -> Step:
        """The rows in the model's own tokens."""
        sample = Examples(self.rows, self.length, seed=self.seed, bos=self.bos, repeat=True)
        return examples(Texts(self.text), model, sample)

    def unseen(self, model: Model) -> Step | None:
        """Rows to judge by what was trained: none."""
        return None


@dataclass(frozen=True)
class Recovering(FineTuning):
    """As a fine-tuning, but towards the original's predictions, and on the calibration's own texts unless told otherwise."""

    text: str = ""
    """The training text, as of a fine-tuning; none: the texts that the model is calibrated on."""
    length: int = 0
    """Tokens of a sequence; 0: as many as the calibration's have."""
    generated: float | None = None
    """The part of the rows that the original writes itself, from 16 of each row's tokens on; none: half of them, where its weights
    take at most 64 GB in memory, which one device then has to hold; of a larger one no row, unless told."""
    loss: Literal["lm", "kl", "both"] = "kl"
    """Predict the text, predict what the original predicts (KL divergence), or both."""
    top: int = 0
    """How many likeliest tokens the original's predictions keep at each position, all others as one. 0: the whole predictions,
    from which more is learned; instead of 8 bytes a likeliest token, the original's last hidden states are stored until then."""
    rate: float = 1e-3
    """The highest learning rate of AdamW."""
    batch: int = 8
    """Sequences of one optimizer step, over all processes: the nearer the model already is, the more of them a step takes to heal
    it further; where it is far, many small steps heal more than few large ones."""
    packed: Packed = "auto"
    """What LoRA trains of packed experts: their codes and scales, which takes no bytes and, while it trains, as much memory as full
    fine-tuning; their scales alone; or factors beside them, which are kept where the budget has room, or merged by packing again,
    whichever loses less. auto: codes, too, of up to two billion weights, and scales alone of more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generated is not None and not 0 <= self.generated <= 1:
            raise ValueError(f"generated={self.generated} is a part of the rows, from 0 to 1")

    def check_files(self) -> None:
        if self.text:
            Texts(self.text).check_local()
        deepspeed_config.read(self.deepspeed or None)

    def data(self, model: Model) -> Step:
        """The rows in the model's own tokens, of which it writes some itself; all of a ready-made matrix."""
        checkpoint = text_model_of(model)
        return partly(self._text(model), checkpoint, self._part(checkpoint), seed=self.seed, dtype=self.dtype)

    def unseen(self, model: Model) -> Step | None:
        """Some rows that the model writes otherwise, to judge by what was trained; None if it is to write nothing."""
        checkpoint = text_model_of(model)
        if not self._part(checkpoint):
            return None
        text = self._text(model)
        rows = max(UNSEEN // text.spec.output.length, 1)
        return alone(text, checkpoint, rows, seed=self.seed + 1, dtype=self.dtype)

    def _text(self, model: Model) -> Step:
        texts = Texts(self.text)
        return tokens(texts, model, Sample(self.rows, self.length, self.seed)) if texts.is_tokens else super().data(model)

    def _part(self, checkpoint: Step) -> float:
        if self.generated is not None:
            return self.generated
        return GENERATED if checkpoint.spec.output.loaded(self.dtype) <= LOADED else 0.0

    def on(self, texts: Texts, heldout: str) -> "Recovering":
        """With its text said. Raises ValueError if a held-out text would be trained on."""
        text = self.text or texts.spec
        trained = Texts(text).files
        for judge in Texts(heldout).each() if heldout else ():
            if trained & judge.files:
                raise ValueError(f"heldout.texts names {judge.spec}, which is trained on, too; judge by text that nothing has seen")
        return replace(self, text=text)


def tuned(model: Model, original: Model, how: FineTuning | None, gang: Gang, passed: Pass) -> Tuned:
    """Fine-tune the model as `how` says, or leave it as it is if that is None. `original` is the teacher, if the loss needs one."""
    if how is None:
        return Tuned(model, None, ())
    rows, teacher = how.data(original), Pass(passed.batch, dtype=passed.dtype)
    made = tune(model, rows, how.recipe, teacher=original, passed=teacher, gang=gang, deepspeed=how.deepspeed or None)
    return replace(made, unseen=how.unseen(original))


def tune(
    model: Model, data: Step, how: Recipe, *, teacher: Model | None = None, passed: Pass = Pass(),
    validation: Mapping[str, Step] | None = None, gang: Gang | None = None, deepspeed: Mapping[str, Any] | str | Path | None = None,
) -> Tuned:  # fmt: skip
    """Train the model on the rows of `data` (`data.examples`, `data.tokens`).

    If the loss needs a teacher, `passed` says how it runs over the data. The loss on each matrix of `validation` decides which
    state is kept. `deepspeed`, a DeepSpeed configuration or the path of one, overrides recipe and gang. Raises ValueError for
    options that cannot work, before anything runs.
    """
    matrices = dict(sorted((validation or {}).items()))
    for name, matrix in {"the data": data, **matrices}.items():
        _check_data(name, matrix, model.config)
    spec: TokensSpec = data.spec.output
    packed = {i: scheme.group for i in model.moe_layers if (scheme := model.layers[i].spec.output.packed)}
    layers = {i: unpacked_shapes(shapes_of(layer.spec.output.tensors), model.config) for i, layer in enumerate(model.layers)}
    family = Family.of(model.config)
    recipe, gang = deepspeed_config.merged(deepspeed_config.read(deepspeed), how, gang or Gang(), spec.sequences)
    recipe = recipe.settled(
        rows=spec.sequences,
        dtype=precision(model.config, recipe.dtype),
        sparse=any(model.layers[i].spec.output.sparse for i in model.moe_layers),
        validated=bool(matrices),
        packed=sum(prod(s) for i in packed for n, s in layers[i].items() if family.kind(n) == "experts"),
    )
    predictions, head = _predictions(model, data, recipe, teacher, passed)
    for i in model.moe_layers:
        _check_trainable(model.layers[i].spec.output, recipe)
    rest = shapes_of(model.rest.spec.output.tensors)
    opened = trained_in(model.config, recipe.mode, recipe.targets, layers, rest)
    work = Work(model.config, layers, rest, opened, recipe, spec.length, packed)
    gang, need = fitted(work, gang)
    checkpoint, heldout = told_model_of(model), tuple(matrices.values())
    trained = finetune.train(checkpoint, data, predictions, heldout, head, names=list(matrices), recipe=recipe).on(
        cpus=gang.cpus, gpus=gang.gpus, memory=need.host, processes=gang.processes, device=need.device, settings=gang.settings(),
        exchanged=exchanged(work, gang), times=1 + 2 / recipe.operations if gang.checkpointing else 1.0,  # one more forward pass
        repeats=min(1.0, gang.save_every / recipe.steps),
    )  # fmt: skip
    parts = {i: trained.part(f"layer-{i:03d}/") for i in opened if i is not None}
    tuned = model.with_layers({i: finetune.layer(part, model.layers[i], layer=i, recipe=recipe) for i, part in parts.items()})
    if None in opened:
        tuned = replace(tuned, rest=finetune.rest_of(trained.part("rest/"), model.rest))
    return Tuned(tuned, trained, (finetune.report(trained.part(finetune.TRAINING)),))


def _predictions(
    model: Model, data: Step, recipe: Recipe, teacher: Model | None, passed: Pass
) -> tuple[tuple[Step, ...], Step | None]:
    """The teacher's predictions for the tokens of `data`, one step per shard, if the loss needs them.

    Each position keeps the `recipe.top` likeliest tokens, at 8 bytes each, and the sum of all others; with 0 the predictions are
    the teacher's hidden states, and its head goes with them. The teacher is streamed layer by layer, so it may be larger than any
    machine's memory. Raises ValueError if there is none, or it has another tokenizer.
    """
    if not recipe.divergence:
        return (), None
    if teacher is None:
        raise ValueError(f"loss={recipe.loss!r} needs a teacher; pass teacher=original, or choose loss=lm")
    theirs, ours = (int(m.config["vocab_size"]) for m in (teacher, model))
    if theirs != ours:
        raise ValueError(f"the teacher's vocabulary has {theirs} tokens, the model's {ours}; choose one of the same tokenizer")
    ends = hidden_states(teacher, data, passed)
    if recipe.whole:
        return ends, teacher.rest
    return tuple(finetune.predictions(teacher.rest, end, top=recipe.top, dtype=passed.dtype) for end in ends), None


def _check_trainable(layer: LayerSpec, recipe: Recipe) -> None:
    """Raise ValueError if this recipe would train packed weights themselves; LoRA's additions to experts are kept beside them."""
    if layer.packed is None:
        layer.check_plain("fine-tune")
        return
    form, family = f"layer {layer.layer} is packed in {layer.packed.words()}", Family.of(layer.config)
    if recipe.mode in ("full", "experts"):
        raise ValueError(f"{form}, and mode={recipe.mode!r} trains its weights; take lora, whose additions are kept beside them")
    if recipe.packed != "beside" and layer.format.added:
        beside = "low-rank additions beside its packed experts, which are no part of their scales"
        raise ValueError(f"layer {layer.layer} has {beside}, and packed={recipe.packed!r} trains these; take packed='beside'")
    shared = any(n + PACKED in layer.tensors for n in family.shared(layer.layer) or ())
    if shared and recipe.mode == "lora" and "shared" in recipe.targets:
        raise ValueError(f"{form}, the shared expert, too, to which nothing can be added; leave shared out of targets")


def _check_data(name: str, matrix: Step, config: Config) -> None:
    spec = matrix.spec.output
    if not isinstance(spec, TokensSpec):
        raise ValueError(f"{name} is made by {matrix.name}, which makes no token matrix; pass one of data.examples or data.tokens")
    positions = config.get("max_position_embeddings")
    if positions and spec.length > positions:
        raise ValueError(f"{name} has sequences of {spec.length} tokens, the model {positions} positions; make them shorter")
