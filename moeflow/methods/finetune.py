"""Fine-tuning with DeepSpeed as a step like any other: a model and text in, the layers that were trained out.

What is trained (`mode`) and towards what (`loss`) is part of the key; how many processes do it, where, and what DeepSpeed divides
between them is not (`Gang`). Everything that can be refused from configurations alone is refused when the graph is built.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeflow.arch import Config
from moeflow.methods import deepspeed_config, distill
from moeflow.methods.distill import PREDICTIONS
from moeflow.methods.drop import checkpoint_of
from moeflow.methods.fetch import Model
from moeflow.methods.recipe import Gang, Recipe, mix_of
from moeflow.methods.reports import row, write_report
from moeflow.methods.slim import SPARSE
from moeflow.methods.targets import MODES, TARGETS, trained_in
from moeflow.methods.tuning_memory import Work, fitted
from moeflow.model.spec import CheckpointSpec, LayerSpec, RestSpec, TensorTable, TokensSpec, precision
from moeflow.step import Artifact, Context, Spec, Step, step

TRAINING = "training.json"


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
        seed=seed, sparse=any(model.layers[i].spec.output.slimmed.startswith(SPARSE) for i in model.moe_layers),
    )  # fmt: skip
    recipe, gang = deepspeed_config.merged(deepspeed_config.read(deepspeed), recipe, gang or Gang())
    for name, matrix in {"the data": data, **domains}.items():
        _check_data(name, matrix, model.config)
    spec: TokensSpec = data.spec.output
    if (recipe.mix > 0) != bool(teacher):
        way = "pass teacher=distill.teacher(original, data)" if recipe.mix else "a teacher is for loss='kl' or 'both'"
        raise ValueError(f"loss={loss!r} and {len(teacher)} steps of a teacher do not go together; {way}")
    if teacher:
        distill.check(teacher, data, int(model.config["vocab_size"]))
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
    changed = {i: layer(trained.part(f"layer-{i:03d}/"), model.layers[i], layer=i) for i in opened if i is not None}
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
    from moeflow.methods.tuning import tune as run

    recipe = Recipe(
        mode=mode, mix=mix, targets=tuple(targets), rank=rank, alpha=alpha, steps=steps, batch=batch, rate=rate, warmup=warmup,
        floor=floor, decay=decay, clip=clip, betas=(betas[0], betas[1]), epsilon=epsilon, dtype=dtype, every=every, keep=keep,
        seed=seed, sparse=sparse,
    )  # fmt: skip
    taught = [artifact.file(PREDICTIONS) for artifact in rest[:teachers]]
    run(context, checkpoint, data, taught, dict(zip(validation, rest[teachers:], strict=True)), recipe)


def _layer_spec(trained: Any, given: LayerSpec, *, layer: int) -> Spec:
    return Spec(given, memory=1 << 20)


@step("finetune.layer", version=1, spec=_layer_spec)
def layer(context: Context, trained: Artifact, given: Artifact, *, layer: int) -> None:
    """One decoder layer as it was trained, and what else the layer's files were before; no byte moves."""
    _linked(context, trained, given)


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
        if name not in new:
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
