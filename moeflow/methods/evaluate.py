"""Measure a compressed model beside its original: what it costs, what it lost, how fast it runs. Each leaves a `report.json`.

Both models are streamed layer by layer; only the speed is measured on whole models, and left out where they do not fit.
"""

import re
from typing import Any

import numpy as np

from moeflow.arch import arch_of
from moeflow.methods import calibrate, drop, tokens
from moeflow.methods.calibrate import HIDDEN, Calibration, hidden_states
from moeflow.methods.choose import CRITERIA, read_choice
from moeflow.methods.fetch import Model
from moeflow.methods.reports import row, write_report
from moeflow.methods.slim import SPARSE
from moeflow.methods.speed import here, speed
from moeflow.model.layout import experts_in, headers, read_config
from moeflow.model.packed import numels
from moeflow.model.spec import CheckpointSpec, HiddenSpec, ObservedSpec, RestSpec, TokensSpec, header_bytes
from moeflow.step import Artifact, Context, Spec, Step, step

LENGTH = 2048
"""Tokens of the sequence whose operations are counted, the paper's."""


def compare(
    calibration: Calibration, compressed: Model, *, heldout: tokens.Texts, sequences: int, length: int, seed: int = 0
) -> tuple[Step, ...]:
    """Reports on `compressed` beside the model that was calibrated: size, quality on each held-out text, speed.

    A model without a tokenizer cannot read text: its quality is measured on the calibration tokens instead, and the report says so.
    """
    original = calibration.model
    both = drop.checkpoint_of(original), drop.checkpoint_of(compressed)
    plan: list[tuple[str, Step, tuple[Step, ...], str]] = []
    if original.has_tokenizer:
        for entry in heldout.entries():
            matrix = tokens.of(_One(entry), original, sequences=sequences, length=length, seed=seed, bos=False)
            plan.append((_name(entry.source), matrix, _hidden(original, matrix, calibration), ""))
    else:
        note = "the model has no tokenizer: held-out text is left out, the loss on the token matrix stands for it"
        plan.append(("token matrix", calibration.tokens, calibration.ends, note))
    chosen = [c for c in compressed.choices if "keep" in c.spec.output]
    zeros = sorted({s for layer in compressed.layers if (s := layer.spec.output.slimmed).startswith(SPARSE)})
    reports = [size(*both, zeros=zeros), *([layers(*chosen)] if chosen else [])]
    for name, matrix, ends, note in plan:
        theirs, seen = _hidden(compressed, matrix, calibration), {}
        if compressed.does_with_fewer:
            passed = calibrate.run(compressed, matrix, **_options(calibration), record=0)
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


def _options(calibration: Calibration) -> dict[str, Any]:
    return {"batch": calibration.batch, "shard": 8 * calibration.batch, "stage": 8, "dtype": calibration.dtype}


def _hidden(model: Model, matrix: Step, calibration: Calibration) -> tuple[Step, ...]:
    return hidden_states(model, matrix, **_options(calibration))


class _One:
    """One text of several, as texts of its own."""

    is_tokens = False

    def __init__(self, entry: Any) -> None:
        self.entry = entry

    def entries(self) -> Any:
        return (self.entry,)


def _name(source: Any) -> str:
    """What a text is called in a report: its file, with the folder where that says more ("wikitext-2-raw-v1/test")."""
    path = (source.files[0].name if len(source.files) == 1 else source.uri).rstrip("/").removeprefix("python:")
    stem = re.sub(r"-\d+-of-\d+$", "", path.rsplit("/", 1)[-1].split("?")[0].split(".")[0])
    return f"{path.split('/')[-2]}/{stem}" if stem in ("train", "test", "validation") and "/" in path else stem


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
        arch = arch_of(config)
        layers = arch.moe_layers(config)
        stems = tuple(arch.experts(i) for i in layers)
        counts.append(
            {
                "parameters": sum(numels({n: t.shape for n, t in tensors.items()}, config).values()),
                "active parameters": active_parameters(config),
                "bytes": sum(artifact.size(n) for n in artifact.names() if n.endswith(".safetensors")),
                "expert bytes": sum(t.nbytes for n, t in tensors.items() if n.startswith(stems)),
                "experts per layer": sum(experts_in(tensors, config, i) for i in layers) / len(layers),
                "decoder layers": arch.num_layers(config),
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
    from moeflow.methods.weigh import counted

    read = read_config(config)
    shards = len(seen) // len(layers)
    found = [counted(seen[at * shards : (at + 1) * shards]) for at in range(len(layers))]
    top_k = arch_of(read).top_k(read)
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
    from moeflow.methods.divergence import compared

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
