"""Run a model over text once, stage by stage, and record what every later decision needs.

The unit of work is (token shard x stage of consecutive layers): `advance` brings hidden states through a stage, `observe` does so
and records on the way. One decoder layer's weights are resident at a time. `curves` measures what a layer's alternatives cost the
whole model: one pass that forks at every layer, once for each alternative, so that the checkpoint is read once for each shard.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeflow.methods.graph import HIDDEN, REST, Calibration, Model, Pass, file_before, file_of
from moeflow.methods.records import CURVES, read_candidates
from moeflow.model.layout import LAYER, ROUTING, read_config
from moeflow.model.spec import (
    ForkSpec,
    HiddenSpec,
    LayerSpec,
    ObservedSpec,
    RestSpec,
    TokensSpec,
    file_bytes,
    header_bytes,
    precision,
)
from moeflow.step import Artifact, Context, Part, Spec, Step, step


def run(
    model: Model,
    tokens: Step,
    *,
    batch: int = 8,
    shard: int = 32,
    stage: int = 8,
    record: int | None = None,
    per_expert: int = 0,
    residual: bool = False,
    between: bool = False,
    dtype: str = "auto",
) -> Calibration:
    """Calibrate `model` on `tokens`, in shards of `shard` sequences and stages of `stage` layers.

    `batch` sequences run together; `record`: tokens whose MoE inputs are kept (all, where it is None), and beyond them up to
    `per_expert` tokens for each expert and shard; `residual` keeps the residual stream of the same tokens too, `between` the
    hidden states before every layer of the first `record` tokens; `dtype`: the precision of the run ("auto": the checkpoint's own).
    """
    spec: TokensSpec = tokens.spec.output
    starts = _embed_shards(model, tokens, batch=batch, shard=shard, dtype=dtype)
    each = shard * spec.length if record is None else -(-record // len(starts))
    observed: dict[int, tuple[Part, ...]] = {i: () for i in model.moe_layers}
    ends = []
    states: dict[int, tuple[Step, ...]] = {}
    before: list[list[Part]] = [[] for _ in model.layers]
    for hidden in starts:
        for first in range(0, len(model.layers), stage):
            indices = list(range(first, min(first + stage, len(model.layers))))
            states[first] = (*states.get(first, ()), hidden)
            hidden = observe(
                model.essential, hidden, *(model.layers[i] for i in indices),
                layers=indices, batch=batch, record=each, per_expert=per_expert, residual=residual, between=between, dtype=dtype,
            )  # fmt: skip
            for i in indices:
                before[i].append(hidden.part(file_before(i)))
                if i in observed:
                    observed[i] += (hidden.part(file_of(i)),)
        ends.append(hidden)
    kept = tuple(map(tuple, before)) if between else ()
    return Calibration(model, tokens, batch, dtype, tuple(starts), tuple(ends), states, observed, each, kept)


def states_before(calibration: Calibration, layer: int) -> tuple[Step, ...]:
    """The hidden states of every shard before `layer` (or behind the last), as the calibrated model has them.

    The calibration's own where a stage begins there; otherwise run from the stage's beginning.
    """
    if layer == len(calibration.model.layers):
        return calibration.ends
    first = max(i for i in calibration.states if i <= layer)
    return advanced(calibration, calibration.states[first], calibration.model.layers, first, layer)


def advanced(calibration: Calibration, states: tuple[Step, ...], layers: Sequence[Step], first: int, stop: int) -> tuple[Step, ...]:
    """The states of every shard before layer `first` taken through these layers up to `stop`."""
    if first == stop:
        return states
    indices = list(range(first, stop))
    return tuple(
        advance(
            calibration.model.essential, h, *(layers[i] for i in indices),
            layers=indices, batch=calibration.batch, dtype=calibration.dtype,
        )
        for h in states
    )  # fmt: skip


def hidden_states(model: Model, tokens: Step, passed: Pass) -> tuple[Step, ...]:
    """The hidden states of `tokens` behind the last layer of `model`, one step per shard; nothing is recorded."""
    ends = []
    for hidden in _embed_shards(model, tokens, batch=passed.batch, shard=passed.sequences, dtype=passed.dtype):
        for first in range(0, len(model.layers), passed.stage):
            indices = list(range(first, min(first + passed.stage, len(model.layers))))
            hidden = advance(
                model.essential,
                hidden,
                *(model.layers[i] for i in indices),
                layers=indices,
                batch=passed.batch,
                dtype=passed.dtype,
            )
        ends.append(hidden)
    return tuple(ends)


def _weights(layer: Artifact) -> Path:
    """A layer's file, or the folder of its files where there are several."""
    return layer.folder() if ROUTING in layer.names() else layer.file(LAYER)


def _embed_shards(model: Model, tokens: Step, *, batch: int, shard: int, dtype: str) -> list[Step]:
    count = tokens.spec.output.sequences
    if batch < 1 or shard % batch:
        raise ValueError(f"shard={shard} sequences must be a multiple of batch={batch}, so that a shard holds whole batches")
    return [
        embed(model.essential, model.rest.part(REST), tokens, first=first, count=min(shard, count - first), dtype=dtype)
        for first in range(0, count, shard)
    ]


def _embed_spec(essential: RestSpec, rest: RestSpec, tokens: TokensSpec, *, first: int, count: int, dtype: str) -> Spec:
    config = rest.config
    positions = config.get("max_position_embeddings")
    if positions and tokens.length > positions:
        raise ValueError(
            f"sequences of {tokens.length} tokens are longer than the model's {positions} positions; make them shorter"
        )
    out = HiddenSpec(config, count, tokens.length, precision(config, dtype))
    table = file_bytes({"e": rest.tensors["model.embed_tokens.weight"]})
    return Spec(out, reads=table + tokens.sequences * tokens.length * 4, writes=out.nbytes, memory=3 * table + 2 * out.nbytes)


@step("calibrate.embed", version=1, spec=_embed_spec, gpus=1)
def embed(context: Context, config: Artifact, rest: Artifact, tokens: Artifact, *, first: int, count: int, dtype: str) -> None:
    """The hidden states [N, L, D] of `count` sequences from the `first` on, before the first layer."""
    import torch

    from moeflow.model import passes

    ids_NL = torch.from_numpy(np.load(tokens.file("tokens.npy"))[first : first + count].astype(np.int64))
    passes.embed(read_config(config), rest, ids_NL, context.out / HIDDEN, dtype=dtype)


def _pass_spec(hidden: HiddenSpec | ObservedSpec, layers: tuple[LayerSpec, ...]) -> tuple[HiddenSpec, int, int]:
    states = hidden.hidden if isinstance(hidden, ObservedSpec) else hidden
    reads = states.nbytes + sum(layer.nbytes for layer in layers)
    # the largest layer twice (file and fused experts), the hidden states, and a batch's activations
    memory = 2 * max(layer.nbytes for layer in layers) + 4 * states.nbytes
    return states, reads, memory


def _advance_spec(config: RestSpec, hidden: Any, *layer_specs: LayerSpec, layers: list[int], batch: int, dtype: str) -> Spec:
    states, reads, memory = _pass_spec(hidden, layer_specs)
    return Spec(states, reads=reads, writes=states.nbytes, memory=memory)


@step("calibrate.advance", version=1, spec=_advance_spec, gpus=1)
def advance(
    context: Context, config: Artifact, hidden: Artifact, *files: Artifact, layers: list[int], batch: int, dtype: str
) -> None:
    """The hidden states behind consecutive `layers`, whose files follow each other in the inputs."""
    from moeflow.model import passes

    given = [(i, _weights(f)) for i, f in zip(layers, files, strict=True)]
    passes.through(
        read_config(config), hidden.file(HIDDEN), given, context.out / HIDDEN, batch=batch, dtype=dtype, progress=context.progress
    )


def _observe_spec(
    config: RestSpec,
    hidden: Any,
    *layer_specs: LayerSpec,
    layers: list[int],
    batch: int,
    record: int,
    per_expert: int,
    residual: bool,
    between: bool,
    dtype: str,
) -> Spec:
    states, reads, memory = _pass_spec(hidden, layer_specs)
    tokens = states.sequences * states.length
    kept = min(tokens, record)
    width, size = int(states.config["hidden_size"]), 4 if states.dtype == "float32" else 2
    writes, most = states.nbytes, kept
    writes += len(layer_specs) * (kept * width * size + 96) if between else 0
    for layer in layer_specs:
        if layer.experts:
            rows = min(tokens, kept + per_expert * layer.experts)
            most = max(most, rows)
            writes += rows * (width * size * (2 if residual else 1) + 8) + tokens * layer.experts * 4 + 8 * 7 * layer.experts + 1400
    moe = tuple(spec.layer for spec in layer_specs if spec.experts)
    return Spec(ObservedSpec(states, kept, most, moe), reads=reads, writes=writes, memory=memory + writes)


@step("calibrate.observe", version=1, spec=_observe_spec, gpus=1)
def observe(
    context: Context, config: Artifact, hidden: Artifact, *files: Artifact,
    layers: list[int], batch: int, record: int, per_expert: int, residual: bool, between: bool, dtype: str,
) -> None:  # fmt: skip
    """`advance`, and beside the hidden states one file per MoE layer with what a `Recorder` saw in it.

    Of a layer that a run has left without experts it holds the number of tokens only. `between`: for each layer also the hidden
    states before it of the first `record` tokens, as `hidden_RD`.
    """
    from moeflow.model import passes

    given = [(i, _weights(f)) for i, f in zip(layers, files, strict=True)]
    passes.through(
        read_config(config), hidden.file(HIDDEN), given, context.out / HIDDEN, batch=batch, dtype=dtype, progress=context.progress,
        recorded=lambda i: context.out / file_of(i), before=(lambda i: context.out / file_before(i)) if between else None,
        budget=record, per_expert=per_expert, residual=residual,
    )  # fmt: skip


SETS, EACH, FILES = "sets", "each", "files"
"""Where a layer's alternatives come from: the sets of a `search.candidates`, each expert left out, or whole layer files."""


def curves(
    calibration: Calibration, alternatives: Mapping[int, tuple[str, Sequence[str], Sequence[Step]]], *, tokens: int, stage: int = 4
) -> Step:
    """Measure every alternative of every layer alone on about `tokens` of the calibration tokens, the same from every shard.

    `alternatives`: per layer where they come from, their names, and the steps that hold them. The checkpoint is read once.
    """
    model, length = calibration.model, calibration.tokens.spec.output.length
    sizes = [_states(s.spec.output).sequences for s in calibration.starts]
    each = max(1, round(tokens / length / len(sizes)))
    taken = [min(each, size) for size in sizes]
    rows = [[sum(sizes[:i]), n] for i, n in enumerate(taken)]
    state: Step = start(*calibration.starts, taken=taken)
    for first in range(0, len(model.layers), stage):
        layers = list(range(first, min(first + stage, len(model.layers))))
        given = [alternatives.get(i, ("", (), ())) for i in layers]
        state = forks(
            model.essential, state, *(model.layers[i] for i in layers), *(s for g in given for s in g[2]),
            layers=layers, kinds=[g[0] for g in given], names=[list(g[1]) for g in given],
            batch=calibration.batch, dtype=calibration.dtype,
        )  # fmt: skip
    return measure(model.rest, calibration.tokens, state, rows=rows, dtype=calibration.dtype)


def _states(spec: Any) -> HiddenSpec:
    return spec.hidden if isinstance(spec, ForkSpec | ObservedSpec) else spec


def _start_spec(*starts: Any, taken: list[int]) -> Spec:
    first = _states(starts[0])
    out = HiddenSpec(first.config, sum(taken), first.length, first.dtype)
    size = out.nbytes // out.sequences
    return Spec(ForkSpec(out, ()), reads=sum(n * size for n in taken), writes=out.nbytes, memory=3 * out.nbytes)


@step("calibrate.start", version=1, spec=_start_spec)
def start(context: Context, *starts: Artifact, taken: list[int]) -> None:
    """The hidden states of the first sequences of every shard, `taken` of each, before the first layer, as one file."""

    from moeflow.methods.calibrate import forking

    forking.first_rows(starts, taken, context.out / HIDDEN)


def _forks_spec(
    rest: RestSpec, before: ForkSpec, *inputs: Any,
    layers: list[int], kinds: list[str], names: list[list[str]], batch: int, dtype: str,
) -> Spec:  # fmt: skip
    layer_specs: Sequence[LayerSpec] = inputs[: len(layers)]
    more = tuple(fork(i, name) for i, found in zip(layers, names, strict=True) for name in found)
    out = ForkSpec(before.hidden, before.forks + more)
    files = sum(i.nbytes if isinstance(i, LayerSpec) else i["bytes"] for i in inputs)
    largest = max(layer.nbytes for layer in layer_specs)
    return Spec(out, reads=before.nbytes + files, writes=out.nbytes, memory=4 * largest + 6 * out.hidden.nbytes)


@step("calibrate.forks", version=1, spec=_forks_spec, gpus=1)
def forks(
    context: Context, config: Artifact, given: Artifact, *inputs: Artifact,
    layers: list[int], kinds: list[str], names: list[list[str]], batch: int, dtype: str,
) -> None:  # fmt: skip
    """The hidden states behind consecutive `layers`, of the model as it is and of every fork that began before or begins here.

    One file each. `inputs`: the layers' files, and then what holds the alternatives of each, in order.
    """

    from moeflow.methods.calibrate import forking
    from moeflow.model.alternatives import Kept, Without

    files, rest = inputs[: len(layers)], list(inputs[len(layers) :])
    alternatives: list[dict[str, Any]] = []
    for kind, found in zip(kinds, names, strict=True):
        if kind == SETS:
            counts = read_candidates(rest.pop(0))["counts"]
            alternatives.append({name: Kept(tuple(counts[name]["best"][0]["keep"])) for name in found})
        elif kind == FILES:
            alternatives.append({name: rest.pop(0).file("layer.safetensors") for name in found})
        else:
            alternatives.append({name: Without(int(name)) for name in found})
    stages = [
        (i, file.file("layer.safetensors"), {fork(i, name): a for name, a in which.items()})
        for i, file, which in zip(layers, files, alternatives, strict=True)
    ]
    forking.through(
        read_config(config), {n: given.file(n) for n in given.names()}, stages, context.out,
        batch=batch, dtype=dtype, progress=context.progress,
    )  # fmt: skip


def fork(layer: int, name: str) -> str:
    """The file with a fork's hidden states."""
    return f"fork.{layer}.{name}.safetensors"


def _measure_spec(rest: RestSpec, matrix: TokensSpec, end: ForkSpec, *, rows: list[list[int]], dtype: str) -> Spec:
    count = len(end.forks)
    reads = rest.head_bytes + header_bytes(rest.tensors) + end.nbytes + matrix.tokens * 4
    width = int(rest.config["vocab_size"]) * 1024 * 4 * 6
    writes = 200 + 90 * count
    memory = 4 * rest.head_bytes + 4 * end.hidden.nbytes + width
    return Spec({"bytes": writes}, reads=reads, writes=writes, memory=memory)


@step("calibrate.curves", version=1, spec=_measure_spec, gpus=1)
def measure(context: Context, rest: Artifact, matrix: Artifact, end: Artifact, *, rows: list[list[int]], dtype: str) -> None:
    """How far the predictions of every fork are from the unchanged model's, and its loss, in nats per token, as `curves.json`.

    `rows`: which sequences of the token matrix the states are of, as runs of (first, count).
    """

    from moeflow.methods.calibrate import forking

    ids = np.load(matrix.file("tokens.npy"), mmap_mode="r")
    taken = np.concatenate([ids[first : first + count] for first, count in rows])
    found = forking.measured(rest, taken, end, dtype=dtype, progress=context.progress)
    (context.out / CURVES).write_text(json.dumps(found, indent=1) + "\n")
