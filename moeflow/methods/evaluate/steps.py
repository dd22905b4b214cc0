"""Measure a compressed model beside its original: size, quality, speed. Each step writes `report.json`.

Both models are streamed layer by layer. Only speed is measured on whole models; it is left out if they do not fit into memory.
"""

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from moeflow.arch import Family
from moeflow.engines import engine_of
from moeflow.methods.evaluate.options import Serving
from moeflow.methods.graph import HIDDEN, TOKENS
from moeflow.methods.records import Choice
from moeflow.methods.reports import figures, row, write_report
from moeflow.methods.scores import SCORES
from moeflow.model import operations
from moeflow.model.for_engine import resident
from moeflow.model.layout import experts_in, headers, read_config
from moeflow.model.memory import on_device
from moeflow.model.packed import numels
from moeflow.model.spec import (
    CheckpointSpec,
    HiddenSpec,
    ObservedSpec,
    RestSpec,
    TokensSpec,
    element_bytes,
    header_bytes,
    precision,
)
from moeflow.step import Artifact, Context, Spec, step

LENGTH = 2048
"""The length of the sequence whose operations are counted, as in the unified framework's paper."""


def _layers_spec(chosen: tuple[Any, ...]) -> Spec:
    return Spec(reads=sum(c["bytes"] for c in chosen), writes=1160, figures=("layer_error",))


@step("evaluate.layers", version=2, spec=_layers_spec)
def layers(context: Context, chosen: tuple[Artifact, ...]) -> None:
    """The relative error of a MoE layer's output, averaged over layers, for the chosen experts and for each baseline's.

    If one of the baselines made the choice, the first row repeats it. Layers whose error was not measured are left out.
    """
    choices = [Choice.read(c) for c in chosen]
    parts = {"as chosen": [c.loss.of_output for c in choices if c.loss]}
    shared = [name for name in SCORES if all(name in c.baselines for c in choices)]  # a choice may be older than a score
    parts |= {f"by {name}": [c.baselines[name].of_output for c in choices] for name in shared}
    rows = [row(f"layer error, {name}", 0.0, float(np.mean(values)), "of output") for name, values in parts.items()]
    rows[0] |= {"figure": "layer_error", "better": "lower"}
    write_report(context, "layers", rows)


SIZES = {
    "parameters": ("parameters", "lower"),
    "active parameters": ("active", "lower"),
    "bytes": ("bytes", "lower"),
    "expert bytes": ("expert_bytes", "lower"),
    "experts per layer": ("experts", ""),
    "decoder layers": ("layers", ""),
    f"operations at {LENGTH:,} tokens": ("operations", "lower"),
    "cache bytes a token": ("cache", "lower"),
}
"""What `size` counts: the words by which a gate names each, and which is better."""


def _size_spec(original: CheckpointSpec, compressed: CheckpointSpec, *, zeros: list[str]) -> Spec:
    return Spec(
        reads=original.headers + compressed.headers,
        writes=1280 + 80 * len(zeros),
        memory=1 << 24,
        figures=tuple(word for word, _ in SIZES.values()),
    )


@step("evaluate.size", version=5, spec=_size_spec)
def size(context: Context, original: Artifact, compressed: Artifact, *, zeros: list[str]) -> None:
    """Parameters, bytes on disk (of the model and of its routed experts), experts per MoE layer, and operations.

    All are counted from the files' headers. Active parameters are those that compute one token, with embedding and head; each layer
    has as many experts as the router gives a token, at their mean size. They leave out what dynamic skipping saves, because that
    depends on the text (see `experts_per_token`). Operations are those of a forward pass over `LENGTH` tokens. `zeros` names the
    methods that made experts sparse: zeros between other weights save no bytes and no operations, and the report says so.
    """
    from moeflow.model.cost import active_parameters, cache_bytes, forward_flops

    counts = []
    for artifact in (original, compressed):
        tensors, config = headers(artifact), read_config(artifact)
        family = Family.of(config)
        layers = family.moe_layers
        stems = tuple(family.experts(i) for i in layers)
        counts.append(
            {
                "parameters": sum(numels({n: t.shape for n, t in tensors.items()}, config).values()),
                "active parameters": active_parameters(config),
                "bytes": sum(artifact.size(n) for n in artifact.names() if n.endswith(".safetensors")),
                "expert bytes": sum(t.nbytes for n, t in tensors.items() if n.startswith(stems)),
                "experts per layer": sum(experts_in(tensors, config, i) for i in layers) / len(layers),
                "decoder layers": family.num_layers,
                f"operations at {LENGTH:,} tokens": forward_flops(config, LENGTH) / 1e12,
                "cache bytes a token": cache_bytes(config),
            }
        )
    units = {"bytes": "B", "expert bytes": "B", f"operations at {LENGTH:,} tokens": "TFLOPs", "cache bytes a token": "B"}
    rows = [row(n, value, counts[1][n], units.get(n, ""), figure=SIZES[n][0], better=SIZES[n][1]) for n, value in counts[0].items()]
    note = f"zeros of {', '.join(zeros)} are stored as weights: they save no bytes at rest" if zeros else ""
    write_report(context, "size", rows, note=note)


def _experts_spec(rest: RestSpec, observed: tuple[tuple[ObservedSpec, ...], ...], *, layers: list[int], name: str) -> Spec:
    named = figures("experts_per_token", "expert_products", text=name)
    return Spec(reads=sum(map(len, observed)) * 1400, writes=560 + 20 * len(layers), memory=1 << 24, figures=named)


@step("evaluate.experts_per_token", version=2, spec=_experts_spec)
def experts_per_token(
    context: Context, config: Artifact, observed: tuple[tuple[Artifact, ...], ...], *, layers: list[int], name: str
) -> None:
    """How many experts compute a token of held-out text: the mean over MoE layers, each layer's mean, and the sum.

    `observed` is what one pass of the compressed model recorded: for each of `layers`, what every shard recorded in it.
    """
    from moeflow.methods.recorded import counted

    counts = [counted(shards) for shards in observed]
    top_k, of = Family.of(read_config(config)).top_k, {"text": name, "better": "lower"}
    rows = [
        row(f"experts a token ({name})", top_k, float(np.mean(counts)), "", figure="experts_per_token", **of),
        row(f"expert products a token ({name})", top_k * len(layers), float(np.sum(counts)), "", figure="expert_products", **of),
    ]
    write_report(context, "experts per token", rows, text=name, layers=dict(zip(map(str, layers), counts, strict=True)))


def _quality_spec(
    original: RestSpec, compressed: RestSpec, matrix: TokensSpec, original_states: tuple[Any, ...],
    compressed_states: tuple[Any, ...], *, name: str, note: str, dtype: str,
) -> Spec:  # fmt: skip
    states: list[HiddenSpec] = [getattr(s, "hidden", s) for s in (*original_states, *compressed_states)]
    head = original.head_bytes
    reads = 2 * (head + header_bytes(original.tensors)) + sum(s.nbytes for s in states) + matrix.tokens * 4
    width = int(original.config["vocab_size"]) * 1024 * 4 * 6
    loaded = original.loaded(dtype, head=True) + compressed.loaded(dtype, head=True)
    memory = 2 * head + loaded + 2 * max(s.nbytes for s in states) + width
    writes, done = 1200 + 96 * matrix.sequences, operations.head(original, 2 * matrix.tokens, dtype)
    named = figures("perplexity", "loss", "kl", "agreement", text=name)
    return Spec(reads=reads, writes=writes, operations=done, memory=memory, device=on_device(loaded + width), figures=named)


@step("evaluate.quality", version=3, spec=_quality_spec, gpus=1)
def quality(
    context: Context, original: Artifact, compressed: Artifact, matrix: Artifact, original_states: tuple[Artifact, ...],
    compressed_states: tuple[Artifact, ...], *, name: str, note: str, dtype: str,
) -> None:  # fmt: skip
    """Perplexity of both models on a token matrix, the compressed model's KL divergence from the original, and top-1 agreement.

    The states are the hidden states behind each model's last layer, shard by shard. The KL divergence is that of the compressed
    model from the original, in nats per token, over the positions that predict a token. The report also has all but perplexity per
    sequence, so that it can tell intervals, and two reports on one text can be compared pair by pair.
    """
    from moeflow.methods.evaluate.divergence import compared

    result = compared(
        original, compressed, np.load(matrix.file(TOKENS)), [s.file(HIDDEN) for s in original_states],
        [s.file(HIDDEN) for s in compressed_states], dtype=dtype, progress=context.progress,
    )  # fmt: skip
    first, second = result.losses
    of = {"text": name, "better": "lower"}
    rows = [
        row(f"perplexity ({name})", float(np.exp(first)), float(np.exp(second)), "", figure="perplexity", **of),
        row(f"loss ({name})", first, second, "nats/token", figure="loss", **of),
        row(f"KL to the original ({name})", 0.0, result.divergence, "nats/token", figure="kl", **of),
        row(f"top-1 agreement ({name})", 1.0, result.agreement, "", figure="agreement", text=name, better="higher"),
    ]
    write_report(
        context, "quality", rows, note=note, tokens=result.tokens, text=name, divergence_of_sequences=result.by_sequence,
        losses_of_sequences=result.losses_by_sequence, agreement_of_sequences=result.agreement_by_sequence,
    )  # fmt: skip


def here() -> dict[str, Any]:
    """What the speed of a model depends on besides the model: processor, cores, GPUs, torch."""
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return {
        "processor": _named(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": [_named(gpu, "Model") for gpu in gpus],
        "torch": metadata.version("torch"),
    }


def _named(path: Path, what: str) -> str:
    """The first value of `what` in a file of "name: value" lines; "" if there is no such file."""
    if not path.exists():
        return ""
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == what), "")


RUNS_OF_SPEED = 8
"""How often a speed is measured: a warm-up, and the rounds of `timing`."""
ROOM = 1.2
"""What both models and their activations take, as a multiple of their bytes on disk."""


SPEEDS = {
    "prefill": ("prefill", "tokens/s", "higher"),
    "decode": ("decode", "tokens/s", "higher"),
    "resident bytes": ("resident", "B", "lower"),
}
"""What `speed` measures: the words by which a gate names each, the units, and which is better."""


def _measured(name: str, original: float | None, compressed: float | None) -> dict[str, Any]:
    figure, unit, better = SPEEDS[name]
    return row(name, original, compressed, unit, figure=figure, better=better)


def _loaded(checkpoint: Artifact) -> int:
    """The bytes of a checkpoint's weights once transformers has loaded them, as `CheckpointSpec.loaded` plans them; at rest, if
    they are of a kind that is not known."""
    config, at_rest = read_config(checkpoint), sum(checkpoint.size(n) for n in checkpoint.names() if n.endswith(".safetensors"))
    try:
        numel = sum(numels({n: t.shape for n, t in headers(checkpoint).items()}, config).values())
        return max(at_rest, numel * element_bytes(config, "auto"))
    except ValueError:
        return at_rest


def _speed_spec(original: CheckpointSpec, compressed: CheckpointSpec, *, machine: Any, length: int, engine: str = "") -> Spec:
    both = sum(c.nbytes + c.others + c.headers for c in (original, compressed))  # headers are looked at first
    need = int((original.loaded() + compressed.loaded()) * ROOM)
    done = RUNS_OF_SPEED * 2 * length * (original.active + compressed.active)
    return Spec(
        reads=both, writes=1400, operations={precision(original.config, "auto"): done}, memory=need,
        device=on_device(need), optional=True, figures=tuple(word for word, _, _ in SPEEDS.values()),
    )  # fmt: skip


@step("evaluate.speed", version=3, spec=_speed_spec, gpus=1)
def speed(
    context: Context, original: Artifact, compressed: Artifact, *, machine: dict[str, Any], length: int, engine: str = ""
) -> None:
    """Tokens per second of prefill (one sequence of `length`) and decode (one token at a time behind it), and resident bytes.

    The figures are medians and quartiles of alternating rounds after a warm-up; where the quartiles of both models overlap, the
    report says that no difference was measured. They depend on the machine, so `machine` is a parameter. If both models do not fit
    into memory at once, or transformers cannot run one, the report has no figures and says so: it is no reason to lose a run.
    `engine`: what is to load the result, if that keeps packed weights as they are; the resident bytes are counted as its own.
    """
    from moeflow.methods.evaluate.timing import DECODED, ROUNDS, device_and_memory, measure

    kept = [resident(a, engine_of(engine), dict(read_config(a))) for a in (original, compressed)] if engine else None
    need = _loaded(original) + _loaded(compressed)
    device, free = device_and_memory()
    positions = int(read_config(original).get("max_position_embeddings") or length + DECODED)
    length = min(length, positions - DECODED)
    if need * ROOM > free:
        return _without_speed(context, f"both models need {need:,} bytes at once, and {free:,} are free on {device}", kept)
    if length < 1:
        return _without_speed(context, f"the model's {positions} positions leave none before the {DECODED} that are decoded", kept)
    folders = [original.folder(), compressed.folder()]  # here, because damage in the store is no matter of speed
    try:
        speeds, measured = measure(folders, device, length, context.progress)
    except Exception as error:  # of any kind: what transformers and devices raise is theirs to choose
        why = f"measuring it failed with {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return _without_speed(context, why, kept)
    rows, same = [], []
    for name, both in speeds.items():
        rows.append(_measured(name, *(s.median for s in both)))
        parts = {", lower quartile": [s.low for s in both], ", upper quartile": [s.high for s in both]}
        rows += [row(name + part, one, other, "tokens/s") for part, (one, other) in parts.items()]
        same += [name] if both[0].overlaps(both[1]) else []
    rows.append(_measured("resident bytes", *(kept or measured)))
    notes = [f"{' and '.join(same)}: no difference measured, the quartiles of {ROUNDS} alternating rounds overlap"] * bool(same)
    note = "; ".join([*notes, *[f"resident bytes are those that {engine} keeps, speed is that of transformers"] * bool(engine)])
    write_report(context, "speed", rows, note=note, machine=here(), asked_on=machine, sequence=length, rounds=ROUNDS)


def _without_speed(context: Context, why: str, resident: Sequence[int] | None) -> None:
    known = {"resident bytes": resident or (None, None)}
    rows = [_measured(name, *known.get(name, (None, None))) for name in SPEEDS]
    write_report(context, "speed", rows, note=f"speed is left out: {why}")


def _serving_spec(original: CheckpointSpec, compressed: CheckpointSpec, matrix: TokensSpec, *, how: Serving, machine: Any) -> Spec:
    both = sum(c.nbytes + c.others for c in (original, compressed))
    need = int(both * ROOM)
    runs = how.rounds * sum(how.requests) * (how.prompt + how.tokens)
    return Spec(
        reads=both + matrix.tokens * 4, writes=4000, memory=need, device=on_device(need), optional=True,
        operations={precision(original.config, how.dtype): 2 * runs * (original.active + compressed.active)},
        figures=how.figures,
    )  # fmt: skip


@step("evaluate.serving", version=1, spec=_serving_spec, gpus=1)
def serving(
    context: Context, original: Artifact, compressed: Artifact, matrix: Artifact, *, how: Serving, machine: dict[str, Any]
) -> None:
    """Both models in vLLM: their speed and memory at several numbers of requests, and whether they write what transformers has.

    The engine runs in a process and an environment of its own; the `settings` of the step's resources say which (`python`), and how
    many `minutes` an answer may take, since neither is part of what is measured. The figures depend on the machine and on the
    engine's version, so `machine` is a parameter. Prompts are cut from `matrix`. Prefill and decode are medians and quartiles of
    rounds in which the models take turns; where the engine's device does not hold both, each is loaded for each of a few turns.
    `served_agreement` is the share of the engine's greedy tokens that are transformers' likeliest behind the same tokens. Where
    there is no engine, or it fails, the report has no figures and says why: it is no reason to lose a run.
    """
    from moeflow.methods.evaluate.engine import EngineFailed
    from moeflow.methods.evaluate.served import measured, rows_of, rows_without

    folders = (original.folder(), compressed.folder())  # here, because damage in the store is no matter of serving
    flat = np.load(matrix.file(TOKENS)).reshape(-1)
    try:
        result = measured(folders, flat, how, context)
    except EngineFailed as error:
        return write_report(context, "serving", rows_without(how), note=f"serving is left out: {error}")
    rows, note = rows_of(result, how)
    write_report(context, "serving", rows, note=note, machine=here(), asked_on=machine, **result.facts)


def _written_spec(original: CheckpointSpec, compressed: CheckpointSpec, *, prompt: str, tokens: int) -> Spec:
    if not prompt or tokens < 1:
        raise ValueError(f"prompt={prompt!r} and tokens={tokens}: there must be words to go on from, and at least one token")
    need = int(max(original.loaded(), compressed.loaded()) * ROOM)
    done = 2 * (len(prompt) + tokens) * (original.active + compressed.active)  # a letter is a token at most
    return Spec(
        reads=original.nbytes + compressed.nbytes, writes=400 + 16 * tokens, memory=need, device=on_device(need),
        operations={precision(original.config, "auto"): done},
    )  # fmt: skip


@step("evaluate.written", version=1, spec=_written_spec, gpus=1)
def written(context: Context, original: Artifact, compressed: Artifact, *, prompt: str, tokens: int) -> None:
    """What each model writes behind `prompt`, `tokens` tokens by its own likeliest next one, for people to look at.

    The models are loaded whole, one after the other.
    """
    from moeflow.methods.evaluate.writing import continued

    before, after = (continued(model.folder(), prompt, tokens) for model in (original, compressed))
    note = f"behind {prompt!r} the original model writes {before!r}, the compressed one {after!r}"
    write_report(context, "written", [], note=note, prompt=prompt, original=before, compressed=after)
