"""Measure a compressed model beside its original: what it costs, what it lost, how fast it runs. Each step leaves a `report.json`.

Both models are streamed layer by layer; only the speed is measured on whole models, and left out where they do not fit.
"""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from moeflow.arch import Family
from moeflow.methods.graph import HIDDEN
from moeflow.methods.records import CRITERIA, read_choice
from moeflow.methods.reports import row, write_report
from moeflow.model.layout import experts_in, headers, read_config
from moeflow.model.packed import numels
from moeflow.model.spec import CheckpointSpec, HiddenSpec, ObservedSpec, RestSpec, TokensSpec, header_bytes
from moeflow.step import Artifact, Context, Spec, step

LENGTH = 2048
"""Tokens of the sequence whose operations are counted, the paper's."""


def _layers_spec(*chosen: Any) -> Spec:
    return Spec(reads=sum(c["bytes"] for c in chosen), writes=1100)


@step("evaluate.layers", version=1, spec=_layers_spec)
def layers(context: Context, *chosen: Artifact) -> None:
    """The error of the layers' outputs, as a part of those outputs, averaged over layers: as chosen, and by each baseline.

    Where the choices weighed nothing but baselines, the first row is one of them.
    """
    found = [read_choice(c) for c in chosen]
    parts = {"as chosen": [c["loss"]["of_output"] for c in found]}
    parts |= {f"by {name}": [c["baselines"][name]["of_output"] for c in found] for name in CRITERIA}
    rows = [row(f"layer error, {name}", 0.0, float(np.mean(values)), "of output") for name, values in parts.items()]
    write_report(context, "layers", rows)


def _size_spec(original: CheckpointSpec, compressed: CheckpointSpec, *, zeros: list[str]) -> Spec:
    return Spec(reads=original.headers + compressed.headers, writes=860 + 80 * len(zeros), memory=1 << 24)


@step("evaluate.size", version=4, spec=_size_spec)
def size(context: Context, original: Artifact, compressed: Artifact, *, zeros: list[str]) -> None:
    """Parameters and bytes at rest, of all and of the routed experts, counted from the files' headers; experts per MoE layer.

    Active parameters are those that compute one token, embedding and head included: of a layer's experts as many as a token is
    computed by, at their mean size. What dynamic skipping saves depends on the text and is not in them (`reach`). Operations are
    those of a forward pass over `LENGTH` tokens. `zeros`: by what experts were made sparse; zeros between other weights save
    nothing at rest, which the report says, and no operations.
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
    rows = [row(n, value, counts[1][n], units.get(n, "")) for n, value in counts[0].items()]
    notes = [f"zeros of {', '.join(zeros)} are stored as weights: they save no bytes at rest"] if zeros else []
    write_report(context, "size", rows, notes=notes)


def _reach_spec(rest: RestSpec, *seen: ObservedSpec, layers: list[int], name: str) -> Spec:
    return Spec(reads=len(seen) * 1400, writes=400 + 20 * len(layers), memory=1 << 24)


@step("evaluate.reach", version=1, spec=_reach_spec)
def reach(context: Context, config: Artifact, *seen: Artifact, layers: list[int], name: str) -> None:
    """How many experts a token of held-out text is computed by: the mean of all MoE layers, that of each, and the sum.

    `seen`: what one pass of the compressed model left, all shards of one layer after those of another.
    """

    from moeflow.methods.recorded import counted

    read = read_config(config)
    shards = len(seen) // len(layers)
    found = [counted(seen[at * shards : (at + 1) * shards]) for at in range(len(layers))]
    top_k = Family.of(read).top_k
    rows = [
        row(f"experts a token ({name})", top_k, float(np.mean(found)), ""),
        row(f"expert products a token ({name})", top_k * len(layers), float(np.sum(found)), ""),
    ]
    write_report(context, "reach", rows, text=name, layers=dict(zip(map(str, layers), found, strict=True)))


def _quality_spec(
    rest: RestSpec, other: RestSpec, matrix: TokensSpec, *ends: Any, firsts: int, name: str, note: str, dtype: str
) -> Spec:
    states: list[HiddenSpec] = [e.hidden if isinstance(e, ObservedSpec) else e for e in ends]
    head = rest.head_bytes
    reads = 2 * (head + header_bytes(rest.tensors)) + sum(s.nbytes for s in states) + matrix.tokens * 4
    width = int(rest.config["vocab_size"]) * 1024 * 4 * 6
    return Spec(reads=reads, writes=800 + 24 * matrix.sequences, memory=4 * head + 2 * max(s.nbytes for s in states) + width)


@step("evaluate.quality", version=2, spec=_quality_spec, gpus=1)
def quality(
    context: Context,
    original: Artifact,
    compressed: Artifact,
    matrix: Artifact,
    *ends: Artifact,
    firsts: int,
    name: str,
    note: str,
    dtype: str,
) -> None:
    """Perplexity of both models on a token matrix, and the KL divergence and top-1 agreement of the second with the first.

    `ends`: the hidden states behind the last layer, shard by shard, `firsts` of the first model and then those of the second. The
    KL divergence is that of the compressed model from the original, in nats per token, over the positions that predict a token; the
    report holds it for every sequence too, so that two reports on one text can be compared pair by pair.
    """

    from moeflow.methods.evaluate.divergence import compared

    files = [e.file(HIDDEN) for e in ends]
    seen, nll_first, nll_second, divergence, agreement, by_sequence = compared(
        original,
        compressed,
        np.load(matrix.file("tokens.npy")),
        files[:firsts],
        files[firsts:],
        dtype=dtype,
        progress=context.progress,
    )
    rows = [
        row(f"perplexity ({name})", float(np.exp(nll_first)), float(np.exp(nll_second)), ""),
        row(f"loss ({name})", nll_first, nll_second, "nats/token"),
        row(f"KL to the original ({name})", 0.0, divergence, "nats/token"),
        row(f"top-1 agreement ({name})", 1.0, agreement, ""),
    ]
    notes = [n for n in (note,) if n]
    write_report(context, "quality", rows, notes=notes, tokens=seen, text=name, divergence_of_sequences=by_sequence)


def here() -> dict[str, Any]:
    """What the speed of a model depends on beside the model: processor, cores, GPUs, torch."""
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return {
        "processor": _named(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": [_named(gpu, "Model") for gpu in gpus],
        "torch": metadata.version("torch"),
    }


def _named(path: Path, what: str) -> str:
    """The first value of `what` in a file of "name: value" lines, or nothing where there is no such file."""
    if not path.exists():
        return ""
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == what), "")


def _speed_spec(original: CheckpointSpec, compressed: CheckpointSpec, *, machine: Any, length: int) -> Spec:
    both = sum(c.nbytes + c.others for c in (original, compressed))
    return Spec(reads=both, writes=560)  # takes the memory that is free, or leaves the speed out


@step("evaluate.speed", version=1, spec=_speed_spec, gpus=1)
def speed(context: Context, original: Artifact, compressed: Artifact, *, machine: dict[str, Any], length: int) -> None:
    """Tokens per second of prefill (one sequence of `length`) and decode (one token at a time behind it), and resident bytes.

    Medians of alternating rounds after a warm-up; the machine is a parameter, since the numbers are facts about it. Where both
    models do not fit into memory at once the report says so and leaves them out.
    """

    from moeflow.methods.evaluate.timing import DECODED, ROUNDS, device_and_memory, measure

    names, units = ("prefill", "decode", "resident bytes"), ("tokens/s", "tokens/s", "B")
    need = sum(a.size(n) for a in (original, compressed) for n in a.names() if n.endswith(".safetensors"))
    device, free = device_and_memory()
    positions = int(read_config(original).get("max_position_embeddings") or length + DECODED)
    length = min(length, positions - DECODED)
    note = ""
    if need * 1.2 > free:
        note = f"speed is left out: both models need {need:,} bytes at once, and {free:,} are free on {device}"
    elif length < 1:
        note = f"speed is left out: the model's {positions} positions leave none before the {DECODED} that are decoded"
    if note:
        write_report(context, "speed", [row(n, None, None, u) for n, u in zip(names, units, strict=True)], notes=[note])
        return
    figures = measure([original.folder(), compressed.folder()], device, length, context.progress)
    rows = [row(n, *figure, u) for n, figure, u in zip(names, figures, units, strict=True)]
    write_report(context, "speed", rows, machine=here(), asked_on=machine, sequence=length, rounds=ROUNDS)
