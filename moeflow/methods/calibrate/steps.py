"""Run a model over text once, stage by stage, and record what every later decision needs.

The unit of work is one token shard and one stage of consecutive layers: `advance` runs hidden states through a stage, and `observe`
also records on the way. One decoder layer's weights are in memory at a time. `curves` measures what a layer's alternatives cost the
whole model: one pass forks at every layer, once for each alternative, so the checkpoint is read once for each shard.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moeflow.arch import EMBEDDING, Family
from moeflow.methods.graph import HIDDEN, REST, TOKENS, Calibration, Model, Pass
from moeflow.methods.records import Candidates
from moeflow.model import operations
from moeflow.model.layout import LAYER, ROUTING, file_before, file_of, read_config
from moeflow.model.memory import on_device, passing
from moeflow.model.spec import (
    ForkSpec,
    HiddenSpec,
    LayerSpec,
    ObservedSpec,
    Recording,
    RestSpec,
    TokensSpec,
    file_bytes,
    header_bytes,
    precision,
)
from moeflow.step import Artifact, Context, Part, Spec, Step, step

STAGE_OF_FORKS = 4
"""Consecutive layers per task when alternatives are measured."""


def run(model: Model, tokens: Step, passed: Pass = Pass(), *, inputs: bool = True, between: bool = False) -> Calibration:
    """Calibrate `model` on a token matrix, as a graph.

    `inputs`: whether to keep the MoE inputs of as many tokens as `passed` says; without them a calibration holds router statistics
    only. `between`: whether to keep the hidden states before every layer, for the same tokens.
    """
    hidden = starts = _embedded(model, tokens, passed)
    tokens_of_shard = passed.sequences_of_shard * tokens.spec.output.length
    each = tokens_of_shard if passed.record is None else -(-passed.record // len(starts))
    recording = Recording(each if inputs else 0, passed.per_expert if inputs else 0, each if between else 0)
    moe_layers = model.moe_layers
    states: dict[int, tuple[Step, ...]] = {}
    observed: dict[int, tuple[Part, ...]] = {}
    before: list[tuple[Part, ...]] = []
    for first, layers in _stages(model, passed.stage):
        states[first] = hidden
        hidden = _behind(model, passed, hidden, first, layers, recording)
        for i in range(first, first + len(layers)):
            before.append(tuple(h.part(file_before(i)) for h in hidden))
            if i in moe_layers:
                observed[i] = tuple(h.part(file_of(i)) for h in hidden)
    return Calibration(model, tokens, passed, starts, hidden, states, observed, each, tuple(before) if between else ())


def hidden_states(model: Model, tokens: Step, passed: Pass = Pass()) -> tuple[Step, ...]:
    """The hidden states of `tokens` behind the last layer of `model`, shard by shard; nothing is recorded."""
    hidden = _embedded(model, tokens, passed)
    for first, layers in _stages(model, passed.stage):
        hidden = _behind(model, passed, hidden, first, layers)
    return hidden


def states_before(calibration: Calibration, layer: int) -> tuple[Step, ...]:
    """The hidden states of every shard before `layer` (or behind the last), in the calibrated model.

    If a stage begins there, they are the calibration's own; otherwise they are run from the stage's beginning.
    """
    if layer == len(calibration.model.layers):
        return calibration.ends
    first = max(i for i in calibration.states if i <= layer)
    return advanced(calibration, calibration.states[first], calibration.model.layers, first, layer)


def advanced(calibration: Calibration, states: tuple[Step, ...], layers: Sequence[Step], first: int, stop: int) -> tuple[Step, ...]:
    """The states of every shard before layer `first`, run through these layers up to `stop`."""
    if first == stop:
        return states
    return _behind(calibration.model, calibration.passed, states, first, tuple(layers[first:stop]))


Rewrite = Callable[[int, Step, tuple[Part, ...]], Step]
"""Takes a layer's number, its file and what every shard recorded in it; returns the file that replaces it."""


def in_sequence(calibration: Calibration, rewrite: Rewrite) -> dict[int, Step]:
    """Rewrite the MoE layers one after the other; each is observed behind the layers that are already rewritten.

    NAEE calls this progressive pruning (Table 6 of the paper); GPTQ and SparseGPT treat a model this way.
    """
    model, passed = calibration.model, calibration.passed
    rewritten: dict[int, Step] = {}
    hidden = calibration.starts
    last = max(calibration.observed, default=-1)
    for i, layer in enumerate(model.layers[: last + 1]):
        if i in calibration.observed:
            recorded = calibration.observed[i]
            if rewritten:
                again = _behind(model, passed, hidden, i, (layer,), Recording(calibration.recorded))
                recorded = tuple(h.part(file_of(i)) for h in again)
            layer = rewritten[i] = rewrite(i, layer, recorded)
        if i < last:
            hidden = _behind(model, passed, hidden, i, (layer,))
    return rewritten


def _stages(model: Model, size: int) -> list[tuple[int, tuple[Step, ...]]]:
    """The model's layers in stages of `size`: for each, the first layer's number and all its layers."""
    return [(first, model.layers[first : first + size]) for first in range(0, len(model.layers), size)]


def _embedded(model: Model, tokens: Step, passed: Pass) -> tuple[Step, ...]:
    """The hidden states of every shard before the first layer."""
    count, size = tokens.spec.output.sequences, passed.sequences_of_shard
    rest = model.rest.part(REST)
    return tuple(
        embed(model.essential, rest, tokens, first=first, count=min(size, count - first), dtype=passed.dtype)
        for first in range(0, count, size)
    )


def _behind(
    model: Model, passed: Pass, states: tuple[Step, ...], first: int, layers: tuple[Step, ...], recording: Recording | None = None
) -> tuple[Step, ...]:
    """The states of every shard, run through these layers from `first` on; with a `recording`, each is recorded on the way."""
    how: dict[str, Any] = {"first": first, "batch": passed.batch, "dtype": passed.dtype}
    if recording is None:
        return tuple(advance(model.essential, hidden, layers, **how) for hidden in states)
    return tuple(observe(model.essential, hidden, layers, recording=recording, **how) for hidden in states)


def _numbered(layers: tuple[Artifact, ...], first: int) -> list[tuple[int, Path]]:
    """The number of each layer, and its file, or the folder of its files if there are several."""
    return list(enumerate((a.folder() if ROUTING in a.names() else a.file(LAYER) for a in layers), first))


def _embed_spec(essential: RestSpec, rest: RestSpec, tokens: TokensSpec, *, first: int, count: int, dtype: str) -> Spec:
    config = rest.config
    positions = config.get("max_position_embeddings")
    if positions and tokens.length > positions:
        raise ValueError(
            f"sequences of {tokens.length} tokens are longer than the model's {positions} positions; make them shorter"
        )
    out = HiddenSpec(config, count, tokens.length, precision(config, dtype))
    table = file_bytes({"e": rest.tensors[EMBEDDING]})
    reads, loaded = table + tokens.sequences * tokens.length * 4, rest.loaded(dtype, head=False)
    memory = 2 * table + loaded + 2 * out.nbytes
    return Spec(out, reads=reads, writes=out.nbytes, memory=memory, device=on_device(loaded + out.nbytes))


@step("calibrate.embed", version=1, spec=_embed_spec, gpus=1)
def embed(context: Context, config: Artifact, rest: Artifact, tokens: Artifact, *, first: int, count: int, dtype: str) -> None:
    """The hidden states [N, L, D] of `count` sequences, from sequence `first` on, before the first layer."""
    import torch

    from moeflow.model import passes

    ids_NL = torch.from_numpy(np.load(tokens.file(TOKENS))[first : first + count].astype(np.int64))
    passes.embed(read_config(config), rest, ids_NL, context.out / HIDDEN, dtype=dtype)


def _pass_spec(hidden: Any, layers: tuple[LayerSpec, ...], dtype: str) -> tuple[HiddenSpec, int, int]:
    """The hidden states behind the layers, the bytes to read with these, and the peak memory."""
    before = _states(hidden)
    states = replace(before, handed_on=Family.of(before.config).handed_on(before.length))
    reads = before.nbytes + sum(layer.nbytes for layer in layers)
    # the largest layer's file and its weights, the states, and a batch's activations
    memory = max(layer.nbytes + layer.loaded(dtype) for layer in layers) + 4 * states.nbytes
    return states, reads, memory


def _advance_spec(config: RestSpec, hidden: Any, layers: tuple[LayerSpec, ...], *, first: int, batch: int, dtype: str) -> Spec:
    states, reads, memory = _pass_spec(hidden, layers, dtype)
    device = on_device(passing(layers, batch * states.length, dtype, handed_on=states.handed_on))
    done = operations.passing(layers, states, dtype)
    return Spec(states, reads=reads, writes=states.nbytes, operations=done, memory=memory, device=device)


@step("calibrate.advance", version=1, spec=_advance_spec, gpus=1)
def advance(
    context: Context, config: Artifact, hidden: Artifact, layers: tuple[Artifact, ...], *, first: int, batch: int, dtype: str
) -> None:
    """The hidden states behind consecutive layers; `first` is the number of the first layer."""
    from moeflow.model import passes

    passes.through(
        read_config(config), hidden.file(HIDDEN), _numbered(layers, first), context.out / HIDDEN,
        batch=batch, dtype=dtype, progress=context.progress,
    )  # fmt: skip


def _observe_spec(
    config: RestSpec, hidden: Any, layers: tuple[LayerSpec, ...], *, first: int, recording: Recording, batch: int, dtype: str
) -> Spec:
    states, reads, memory = _pass_spec(hidden, layers, dtype)
    device = on_device(passing(layers, batch * states.length, dtype, handed_on=states.handed_on, recorded=True))
    tokens = states.sequences * states.length
    row = int(states.config["hidden_size"]) * states.itemsize
    kept = most = min(tokens, recording.inputs)
    writes = states.nbytes
    writes += len(layers) * (min(tokens, recording.between) * row + 96) if recording.between else 0
    for layer in layers:
        if layer.experts:
            rows = min(tokens, kept + recording.per_expert * layer.experts)
            most = max(most, rows)
            writes += rows * (row + 8) + tokens * layer.experts * 4 + 8 * 7 * layer.experts + 1400
    moe = tuple(spec.layer for spec in layers if spec.experts)
    out, done = ObservedSpec(states, kept, most, moe), operations.passing(layers, states, dtype)
    return Spec(out, reads=reads, writes=writes, operations=done, memory=memory + writes, device=device)


@step("calibrate.observe", version=1, spec=_observe_spec, gpus=1)
def observe(
    context: Context, config: Artifact, hidden: Artifact, layers: tuple[Artifact, ...],
    *, first: int, recording: Recording, batch: int, dtype: str,
) -> None:  # fmt: skip
    """Do what `advance` does, and also write one file per MoE layer with what a `Recorder` saw in it.

    If trimming removed a layer's experts, its file holds only the token count. With `recording.between` there is also a file per
    layer with the hidden states before it, as `hidden_RD`.
    """
    from moeflow.model import passes

    passes.through(
        read_config(config), hidden.file(HIDDEN), _numbered(layers, first), context.out / HIDDEN,
        batch=batch, dtype=dtype, progress=context.progress, recording=recording,
    )  # fmt: skip


@dataclass(frozen=True)
class Forks:
    """The alternatives of one layer: where they come from, and their names."""

    kind: Literal["sets", "each", "files"]
    """The best sets of a layer's candidates, the layer without one of its experts, or other files of the layer."""
    names: tuple[str, ...]
    """The name of each: the count that a set keeps, the expert that is left out, or a file's name."""
    whole: str = ""
    """The name of the layer as it was, if the model has one of its alternatives in its place already."""


@dataclass(frozen=True)
class Alternatives:
    """The alternatives of one layer, and the steps that hold them: one of candidates for "sets", one per name for "files"."""

    forks: Forks
    steps: tuple[Step, ...] = ()


def curves(calibration: Calibration, alternatives: Mapping[int, Alternatives], *, tokens: int, around: Model | None = None) -> Step:
    """Measure every alternative of every layer alone, on about `tokens` calibration tokens, equally many from every shard.

    `around`: the model of which one layer at a time is another, if that is not the calibrated one; what is measured is how far it
    is from the calibrated one then.
    """
    model, passed = around or calibration.model, calibration.passed
    length = calibration.tokens.spec.output.length
    sizes = [_states(s.spec.output).sequences for s in calibration.starts]
    each = max(1, round(tokens / length / len(sizes)))
    taken = [min(each, size) for size in sizes]
    rows = [[sum(sizes[:i]), n] for i, n in enumerate(taken)]
    state: Step = start(calibration.starts, taken=taken)
    for first, layers in _stages(model, STAGE_OF_FORKS):
        own = [alternatives.get(i) for i in range(first, first + len(layers))]
        state = forks(
            model.essential, state, layers, tuple(a.steps if a else () for a in own),
            first=first, alternatives=[a.forks if a else None for a in own], batch=passed.batch, dtype=passed.dtype,
        )  # fmt: skip
    ends = None if around is None else start(tuple(end.part(HIDDEN) for end in calibration.ends), taken=taken)
    return measure(model.rest, calibration.tokens, state, ends, rows=rows, dtype=passed.dtype)


def _states(spec: Any) -> HiddenSpec:
    return spec.hidden if isinstance(spec, ForkSpec | ObservedSpec) else spec


def _start_spec(starts: tuple[Any, ...], *, taken: list[int]) -> Spec:
    first = _states(starts[0])
    out = HiddenSpec(first.config, sum(taken), first.length, first.dtype)
    size = out.nbytes // out.sequences
    return Spec(ForkSpec(out, ()), reads=sum(n * size for n in taken), writes=out.nbytes, memory=3 * out.nbytes)


@step("calibrate.start", version=1, spec=_start_spec)
def start(context: Context, starts: tuple[Artifact, ...], *, taken: list[int]) -> None:
    """The hidden states, before the first layer, of the first sequences of every shard, `taken` of each, as one file."""
    from moeflow.methods.calibrate import forking

    forking.first_rows(starts, taken, context.out / HIDDEN)


def _forks_spec(
    config: RestSpec, before: ForkSpec, layers: tuple[LayerSpec, ...], sources: tuple[tuple[Any, ...], ...] = (),
    *, first: int, alternatives: list[Forks | None], batch: int, dtype: str,
) -> Spec:  # fmt: skip
    more = tuple(fork(i, name) for i, one in enumerate(alternatives, first) if one for name in one.names)
    hidden = replace(before.hidden, handed_on=Family.of(before.hidden.config).handed_on(before.hidden.length))
    out = ForkSpec(hidden, before.forks + more)
    read = sum(layer.nbytes for layer in layers)
    read += sum(one.nbytes if isinstance(one, LayerSpec) else one["bytes"] for several in sources for one in several)
    memory = 2 * max(layer.nbytes + layer.loaded(dtype) for layer in layers) + 6 * out.hidden.nbytes
    device = on_device(passing(layers, batch * hidden.length, dtype, handed_on=hidden.handed_on, copies=2))
    begun = [len(one.names) if one else 0 for one in alternatives]
    runs = [1 + len(before.forks) + sum(begun[: at + 1]) for at in range(len(layers))]  # of each layer: the model's, and its forks'
    done = operations.passing((layer for n, layer in zip(runs, layers, strict=True) for _ in range(n)), hidden, dtype)
    return Spec(out, reads=before.nbytes + read, writes=out.nbytes, operations=done, memory=memory, device=device)


@step("calibrate.forks", version=1, spec=_forks_spec, gpus=1)
def forks(
    context: Context, config: Artifact, before: Artifact, layers: tuple[Artifact, ...],
    sources: tuple[tuple[Artifact, ...], ...] = (),
    *, first: int, alternatives: list[Forks | None], batch: int, dtype: str,
) -> None:  # fmt: skip
    """The hidden states behind consecutive layers: of the unchanged model, and of every fork that began before or begins here.

    One file each. `sources`: for each layer, the artifacts that hold its alternatives: one of candidates for "sets", a layer for
    each name for "files"; absent if no layer needs any.
    """
    from moeflow.methods.calibrate import forking
    from moeflow.model.alternatives import Alternative, Kept, Without

    stages = []
    for i, (file, which, artifacts) in enumerate(zip(layers, alternatives, sources or ((),) * len(layers), strict=True), first):
        begun: dict[str, Alternative] = {}
        if which and which.kind == "sets":
            counts = Candidates.read(artifacts[0]).counts
            begun = {name: Kept(counts[int(name)].best[0].keep) for name in which.names}
        elif which and which.kind == "files":
            begun = {name: artifact.file(LAYER) for name, artifact in zip(which.names, artifacts, strict=True)}
        elif which:
            begun = {name: Without(int(name)) for name in which.names}
        whole = begun.get(which.whole) if which else None
        named = {fork(i, name): alternative for name, alternative in begun.items()}
        stages.append(forking.Stage(i, file.file(LAYER), named, whole if isinstance(whole, Path) else None))
    forking.through(
        read_config(config), {n: before.file(n) for n in before.names()}, stages, context.out,
        batch=batch, dtype=dtype, progress=context.progress,
    )  # fmt: skip


def fork(layer: int, name: str) -> str:
    """The name of the file with a fork's hidden states."""
    return f"fork.{layer}.{name}.safetensors"


def _measure_spec(
    rest: RestSpec, matrix: TokensSpec, end: ForkSpec, against: ForkSpec | None = None, *, rows: list[list[int]], dtype: str
) -> Spec:
    count = len(end.forks)
    reads = rest.head_bytes + header_bytes(rest.tensors) + end.nbytes + matrix.tokens * 4 + (against.nbytes if against else 0)
    width = int(rest.config["vocab_size"]) * 1024 * 4 * 6
    writes = 200 + 90 * count
    head = rest.loaded(dtype, head=True)
    memory = 2 * rest.head_bytes + 2 * head + 4 * end.hidden.nbytes + width
    done = operations.head(rest, (1 + count) * end.hidden.sequences * end.hidden.length, dtype)
    return Spec({"bytes": writes}, reads=reads, writes=writes, operations=done, memory=memory, device=on_device(head + width))


@step("calibrate.curves", version=1, spec=_measure_spec, gpus=1)
def measure(
    context: Context, rest: Artifact, matrix: Artifact, end: Artifact, against: Artifact | None = None,
    *, rows: list[list[int]], dtype: str,
) -> None:  # fmt: skip
    """Measure how far every fork's predictions are from the unchanged model's, and its loss, in nats per token: `curves.json`.

    `rows`: the sequences of the token matrix that the states belong to, as runs of (first, count). `against`: the states of the
    model from which the divergence is measured, if that is not the unchanged one.
    """
    from moeflow.methods.calibrate import forking

    ids = np.load(matrix.file(TOKENS), mmap_mode="r")
    taken = np.concatenate([ids[first : first + count] for first, count in rows])
    forking.measured(rest, taken, end, against, dtype=dtype, progress=context.progress).write(context.out)
