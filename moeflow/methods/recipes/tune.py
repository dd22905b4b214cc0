"""A model fine-tuned on text, towards the text, towards what a teacher predicts, or both. Only graphs are built here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeflow.arch import Config
from moeflow.methods.calibrate.steps import hidden_states
from moeflow.methods.checkpoint.steps import checkpoint_of
from moeflow.methods.finetune import deepspeed_config
from moeflow.methods.finetune import steps as finetune
from moeflow.methods.finetune.memory import Work, fitted
from moeflow.methods.finetune.recipe import Gang, Recipe, mix_of
from moeflow.methods.finetune.steps import TRAINING, predictions, report, rest_of, train
from moeflow.methods.finetune.targets import MODES, TARGETS, trained_in
from moeflow.methods.graph import Model, Pass
from moeflow.model.spec import TensorTable, TokensSpec, precision
from moeflow.step import Step


def teacher(original: Model, data: Step, passed: Pass = Pass(), *, top: int = 64) -> tuple[Step, ...]:
    """What `original` predicts for the tokens of `data`: the `top` likeliest tokens of each position, and the rest as one.

    8 bytes for each token that is kept. As it is streamed layer by layer, the teacher may be larger than any machine's memory.
    """
    ends = hidden_states(original, data, passed)
    return tuple(predictions(original.rest, end, top=top, dtype=passed.dtype) for end in ends)


def teachers(loss: str) -> Callable[..., tuple[Step, ...]]:
    """`teacher` where this loss (of `recipe.LOSSES`) needs one, and otherwise a function that gives none."""
    return (lambda original, data, **options: ()) if loss == "lm" else teacher


@dataclass(frozen=True)
class Tuned:
    """A model, the step that fine-tuned it where one did, and a report on how that went."""

    model: Model
    trained: Step | None
    reports: tuple[Step, ...]


def stage(name: str) -> Callable[..., Tuned]:
    """What `-p tune=` names: `tune` in this mode, or with "none" a function that gives the model as it is.

    The data come as a function that makes them, so that with "none" no text has to be there.
    """
    if name == "none":
        return lambda model, data, **options: Tuned(model, None, ())
    if name not in MODES:
        raise ValueError(f"tune={name!r} is not known; choose one of none, {', '.join(MODES)}")
    return lambda model, data, **options: tune(model, data(), mode=name, **options)


def tune(
    model: Model,
    data: Step,
    *,
    mode: str = "lora",
    loss: str = "lm",
    teacher: tuple[Step, ...] = (),
    targets: tuple[str, ...] = ("attention", "experts"),
    rank: int = 16,
    alpha: float = 32.0,
    steps: int,
    batch: int,
    rate: float,
    warmup: float = 0.03,
    decay: float = 0.0,
    clip: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    mix: float = 0.5,
    dtype: str = "auto",
    validation: Mapping[str, Step] | None = None,
    every: int = 0,
    keep: str = "best",
    seed: int = 0,
    deepspeed: Mapping[str, Any] | str | Path | None = None,
    gang: Gang | None = None,
) -> Tuned:
    """`model` trained on the rows of `data` (`examples.of`, `tokens.of`), whatever it was compressed with.

    `mode`: "lora" adds matrices of `rank`, weighed by `alpha` / `rank`, to the `targets` and merges them at the end; "full" trains
    everything, "experts" the routed experts, "router" the routers, "compressed_experts" the vectors of Compressed Experts alone.
    `loss`: "lm" predicts the text, "kl" the `teacher` (`distill.teacher` on the same data; with mode "router" this is Router-KD),
    "both" mixes them, `mix` of it KL. `steps` optimizer steps of `batch` sequences each, over all processes, by AdamW at `rate`,
    which rises over the part `warmup` of the steps and falls along a cosine. `dtype`: "float32", "bfloat16" (a copy in fp32 is
    what is trained) or the checkpoint's. The loss on each matrix of `validation` is taken before, after every `every` steps (0: no
    more often) and at the end, and the state with the best mean is kept, or the last (`keep`). `deepspeed`: a DeepSpeed
    configuration, or the path of one, which wins over the arguments. Raises ValueError for what cannot be, before anything runs.
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup={warmup} is a part of the steps, from 0 to below 1")
    domains = dict(sorted((validation or {}).items()))
    lora = mode == "lora"
    recipe = Recipe(
        mode=mode, mix=mix_of(loss, mix), targets=tuple(t for t in TARGETS if t in _known(targets)) if lora else (),
        rank=rank if lora else 0, alpha=float(alpha) if lora else 0.0, steps=steps, batch=batch, rate=float(rate),
        warmup=round(warmup * steps), floor=0.0, decay=float(decay), clip=float(clip), betas=betas, epsilon=1e-8,
        dtype=precision(model.config, dtype), every=(every if domains else 0) or max(steps, 1), keep=keep if domains else "last",
        seed=seed, sparse=any(model.layers[i].spec.output.sparse for i in model.moe_layers),
    )  # fmt: skip
    recipe, gang = deepspeed_config.merged(deepspeed_config.read(deepspeed), recipe, gang or Gang())
    for name, matrix in {"the data": data, **domains}.items():
        _check_data(name, matrix, model.config)
    spec: TokensSpec = data.spec.output
    if (recipe.mix > 0) != bool(teacher):
        way = "pass teacher=distill.teacher(original, data)" if recipe.mix else "a teacher is for loss='kl' or 'both'"
        raise ValueError(f"loss={loss!r} and {len(teacher)} steps of a teacher do not go together; {way}")
    if teacher:
        finetune.check_teacher(teacher, data, int(model.config["vocab_size"]))
    for i in model.moe_layers:
        model.layers[i].spec.output.check_plain("fine-tune")
    layers = {i: _shapes(layer.spec.output.tensors) for i, layer in enumerate(model.layers)}
    rest = _shapes(model.rest.spec.output.tensors)
    opened = trained_in(model.config, recipe.mode, recipe.targets, layers, rest)
    gang, need = fitted(Work(model.config, layers, rest, opened, recipe, spec.length), gang)
    trained = train(
        checkpoint_of(model), data, *teacher, *domains.values(), **recipe.params(), teachers=len(teacher), validation=list(domains)
    ).on(
        cpus=gang.cpus, gpus=gang.gpus, memory=need.host, processes=gang.processes, device=need.device, settings=gang.settings()
    )  # fmt: skip
    changed = {i: finetune.layer(trained.part(f"layer-{i:03d}/"), model.layers[i], layer=i) for i in opened if i is not None}
    tuned = replace(model.with_layers(changed), rest=rest_of(trained.part("rest/"), model.rest) if None in opened else model.rest)
    return Tuned(tuned, trained, (report(trained.part(TRAINING)),))


def _known(targets: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := [t for t in targets if t not in TARGETS]:
        raise ValueError(f"target {unknown[0]!r} is not known; choose of {', '.join(TARGETS)}")
    return targets


def _shapes(table: TensorTable) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in table.items()}


def _check_data(name: str, matrix: Step, config: Config) -> None:
    spec = matrix.spec.output
    if not isinstance(spec, TokensSpec):
        raise ValueError(f"{name} is made by {matrix.name}, which makes no token matrix; pass one of examples.of or tokens.of")
    positions = config.get("max_position_embeddings")
    if positions and spec.length > positions:
        raise ValueError(f"{name} has sequences of {spec.length} tokens, the model {positions} positions; make them shorter")
