"""Run a model over text once, stage by stage, and record what every later decision needs.

The unit of work is one token shard and one stage of consecutive layers: `advance` runs hidden states through a stage, and `observe`
also records on the way. One decoder layer's weights are in memory at a time. `curves` measures what a layer's alternatives cost the
whole model: a chain begins at every stage, forks there at every layer, once for each alternative, and takes all forks to the end.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from moeflow.arch import EMBEDDING, Family
from moeflow.methods.calibrate.chains import Alternatives, Chain, Forks, groups, joined, rows_of, states_of, taken_of_parts
from moeflow.methods.calibrate.counted import traffic_of
from moeflow.methods.graph import HIDDEN, REST, TOKENS, Calibration, Model, Pass, at_most
from moeflow.methods.records import Curves, Shortlist
from moeflow.model import operations
from moeflow.model.ahead import ahead
from moeflow.model.layout import LAYER, ROUTING, Files, file_before, file_beside, file_of, read_config
from moeflow.model.memory import on_device, passing
from moeflow.model.spec import (
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
from moeflow.sources.elsewhere import weights
from moeflow.step import Artifact, Context, Part, Spec, Step, step

HELD = 10 << 30
"""Bytes of hidden states that the forks of one task take at most when alternatives are measured."""


def run(
    model: Model, tokens: Step, passed: Pass = Pass(), *, inputs: bool = True, between: bool = False, beside: int = 0
) -> Calibration:
    """Calibrate `model` on a token matrix, as a graph.

    `inputs`: whether to keep the MoE inputs of as many tokens as `passed` says; without them a calibration holds router statistics
    only. `between`: whether to keep the hidden states before every layer, for the same tokens. `beside`: keep what every block's
    output is added to, for the tokens that are recorded where the model is rewritten in sequence in shards of so many sequences.

    What an engine counted (`data.traffic`) goes along for a model that has its experts; if no token ids go with it, nothing is run.
    """
    counted = traffic_of(model, tokens)
    if not tokens.spec.output.sequences:
        return Calibration(model, tokens, passed, (), (), {}, {}, 0, traffic=counted)
    hidden = starts = _embedded(model, tokens, passed)
    sequences, length = tokens.spec.output.sequences, tokens.spec.output.length
    each = passed.recorded(sequences, length, passed.shard)
    rows = (passed.recorded(sequences, length, beside), beside * length) if beside else (0, 0)
    recording = Recording(each if inputs else 0, passed.per_expert if inputs else 0, each if between else 0, rows)
    moe_layers = model.moe_layers
    states: dict[int, tuple[Step, ...]] = {}
    observed: dict[int, tuple[Part, ...]] = {}
    before: list[tuple[Part, ...]] = []
    added: dict[int, tuple[Part, ...]] = {}
    for first, layers in _stages(model, passed.stage):
        states[first] = hidden
        hidden = behind(model, passed, hidden, first, layers, recording)
        for i in range(first, first + len(layers)):
            before.append(tuple(h.part(file_before(i)) for h in hidden))
            if i in moe_layers:
                observed[i] = tuple(h.part(file_of(i)) for h in hidden)
                added |= {i: tuple(h.part(file_beside(i)) for h in hidden)} if beside else {}
    kept = tuple(before) if between else ()
    return Calibration(model, tokens, passed, starts, hidden, states, observed, each, kept, traffic=counted, beside=added)


def hidden_states(model: Model, tokens: Step, passed: Pass = Pass()) -> tuple[Step, ...]:
    """The hidden states of `tokens` behind the last layer of `model`, shard by shard; nothing is recorded."""
    hidden = _embedded(model, tokens, passed)
    for first, layers in _stages(model, passed.stage):
        hidden = behind(model, passed, hidden, first, layers)
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
    return behind(calibration.model, calibration.passed, states, first, tuple(layers[first:stop]))


def _stages(model: Model, size: int) -> list[tuple[int, tuple[Step, ...]]]:
    """The model's layers in stages of `size`: for each, the first layer's number and all its layers."""
    return [(first, model.layers[first : first + size]) for first in range(0, len(model.layers), size)]


def _embedded(model: Model, tokens: Step, passed: Pass) -> tuple[Step, ...]:
    """The hidden states of every shard before the first layer."""
    count, size = tokens.spec.output.sequences, passed.shard
    rest = model.rest.part(REST)
    return tuple(
        embed(model.essential, rest, tokens, first=first, count=min(size, count - first), dtype=passed.dtype)
        for first in range(0, count, size)
    )


def behind(
    model: Model, passed: Pass, states: tuple[Step, ...], first: int, layers: tuple[Step, ...], recording: Recording | None = None
) -> tuple[Step, ...]:
    """The states of every shard, run through these layers from `first` on; with a `recording`, each is recorded on the way."""
    how: dict[str, Any] = {"first": first, "dtype": passed.dtype}
    step = advance if recording is None else partial(observe, recording=recording)
    return tuple(passed.bounded(step(model.essential, hidden, layers, **how)) for hidden in states)


def _read(layers: tuple[Artifact, ...]) -> Iterator[Path | Files]:
    """The file of each layer, or the folder of its files if there are several; the next is fetched while one is used."""
    return ahead(layer.folder() if ROUTING in layer.names() else weights(layer, LAYER) for layer in layers)


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
    before = states_of(hidden)
    states = replace(before, handed_on=Family.of(before.config).handed_on(before.length))
    reads = before.nbytes + sum(layer.nbytes for layer in layers)
    # the largest layer's file and its weights, the states, and a batch's activations
    memory = max(layer.nbytes + layer.loaded(dtype) for layer in layers) + 4 * states.nbytes
    return states, reads, memory


def _advance_spec(config: RestSpec, hidden: Any, layers: tuple[LayerSpec, ...], *, first: int, dtype: str) -> Spec:
    states, reads, memory = _pass_spec(hidden, layers, dtype)
    device = on_device(passing(layers, states.length, dtype, handed_on=states.handed_on))
    done = operations.passing(layers, states, dtype)
    return Spec(states, reads=reads, writes=states.nbytes, operations=done, memory=memory, device=device)


@step("calibrate.advance", version=1, spec=_advance_spec, gpus=1)
def advance(context: Context, config: Artifact, hidden: Artifact, layers: tuple[Artifact, ...], *, first: int, dtype: str) -> None:
    """The hidden states behind consecutive layers; `first` is the number of the first layer."""
    from moeflow.model import passes

    passes.through(
        read_config(config), hidden.file(HIDDEN), enumerate(_read(layers), first), context.out / HIDDEN,
        count=len(layers),
        batch=at_most(context), dtype=dtype, progress=context.progress,
    )  # fmt: skip


def _observe_spec(
    config: RestSpec, hidden: Any, layers: tuple[LayerSpec, ...], *, first: int, recording: Recording, dtype: str
) -> Spec:
    states, reads, memory = _pass_spec(hidden, layers, dtype)
    device = on_device(passing(layers, states.length, dtype, handed_on=states.handed_on, recorded=True))
    tokens = states.sequences * states.length
    row = int(states.config["hidden_size"]) * states.itemsize
    kept = most = min(tokens, recording.inputs)
    writes = states.nbytes
    writes += len(layers) * (min(tokens, recording.between) * row + 96) if recording.between else 0
    for layer in layers:
        if layer.experts:
            writes += recording.besides(tokens) * row + 96 if recording.beside[0] else 0
            rows = min(tokens, kept + recording.per_expert * layer.experts)
            most = max(most, rows)
            writes += rows * (row + 8) + tokens * layer.experts * 4 + 8 * 7 * layer.experts + 1400
    moe = tuple(spec.layer for spec in layers if spec.experts)
    out, done = ObservedSpec(states, kept, most, moe), operations.passing(layers, states, dtype)
    parts = {file_of(first + i): 3 + i for i in range(len(layers))}  # the configuration, the states, and the layers so far
    parts |= {file_before(first + i): 2 + i for i in range(len(layers))}
    parts |= {file_beside(first + i): 3 + i for i in range(len(layers))}
    return Spec(out, reads=reads, writes=writes, operations=done, memory=memory + writes, device=device, parts=parts)


@step("calibrate.observe", version=1, spec=_observe_spec, gpus=1)
def observe(
    context: Context, config: Artifact, hidden: Artifact, layers: tuple[Artifact, ...],
    *, first: int, recording: Recording, dtype: str,
) -> None:  # fmt: skip
    """Do what `advance` does, and also write one file per MoE layer with what a `Recorder` saw in it.

    If trimming removed a layer's experts, its file holds only the token count. With `recording.between` there is also a file per
    layer with the hidden states before it, as `hidden_RD`; with `recording.beside` one per MoE layer with what the block's output
    is added to, as `beside_RD`, which has no rows if the layer does anything else with it.
    """
    from moeflow.model import passes

    passes.through(
        read_config(config), hidden.file(HIDDEN), enumerate(_read(layers), first), context.out / HIDDEN,
        count=len(layers),
        batch=at_most(context), dtype=dtype, progress=context.progress, recording=recording,
    )  # fmt: skip


def _inputs_spec(config: RestSpec, hidden: Any, layer: LayerSpec, *, at: int, recorded: int, beside: bool, dtype: str) -> Spec:
    family = Family.of(layer.config)
    read = replace(layer, tensors={n: t for n, t in layer.tensors.items() if not family.of_expert(n, at)})
    states, reads, memory = _pass_spec(hidden, (read,), dtype)
    row, tokens = int(states.config["hidden_size"]) * states.itemsize, min(recorded, states.sequences * states.length)
    device = on_device(passing((read,), states.length, dtype, handed_on=states.handed_on))
    done = operations.passing((read,), replace(states, sequences=-(-tokens // states.length)), dtype)
    out = ObservedSpec(states, tokens, tokens, (at,))
    return Spec(
        out, reads=reads + layer.headers, writes=tokens * row * (1 + beside) + 300, operations=done, memory=memory, device=device
    )


@step("calibrate.inputs", version=2, spec=_inputs_spec, gpus=1)
def inputs(
    context: Context, config: Artifact, hidden: Artifact, layer: Artifact, *, at: int, recorded: int, beside: bool, dtype: str
) -> None:
    """What the MoE block of decoder layer `at` takes in, for the first `recorded` tokens of a shard; no expert is read or run.

    Writes what `observe` writes of them, `x_RD` and `sample`, into the same file; with `beside` also `beside_RD`, to which the
    block's output is added.
    """
    from moeflow.model import passes

    passes.inputs(
        read_config(config), hidden.file(HIDDEN), at, next(_read((layer,))), context.out / file_of(at),
        recorded=recorded, beside=beside, batch=at_most(context), dtype=dtype, progress=context.progress,
    )  # fmt: skip


def curves(
    calibration: Calibration, alternatives: Mapping[int, Alternatives], *, tokens: int, around: Model | None = None,
    ends: tuple[Step, ...] = (), shortlist: Part | None = None, listed: int = 0,
) -> Step:  # fmt: skip
    """Measure every alternative of every layer alone, on about `tokens` calibration tokens, equally many from every shard.

    A chain for each stage of the calibration in which alternatives begin, from its own states there to the end; several where
    their forks would take more than `HELD` bytes. Chains do not wait for each other, and store no states.

    `around`: the model of which one layer at a time is another, if that is not the calibrated one; what is measured is how far it
    is from the calibrated one then. Its own states are run once, for all chains; where there are no alternatives, its states
    behind the last layer may be given as `ends`, for the calibration's tokens, in its shards or in parts of these. `shortlist`: the
    part of a step that is a `Shortlist`, of at most `listed` alternatives a layer; only these are measured.
    """
    model, passed, rows = around or calibration.model, calibration.passed, rows_of(calibration, tokens)
    states, against = calibration.states, () if around is None else _hidden(calibration.ends)
    ends = ends or (calibration.ends if around is None else ())
    if around is not None and not ends:
        state: tuple[Step, ...] = (start(_hidden(calibration.starts), taken=[n for _, n in rows]),)
        states = {}
        for first, layers in _stages(model, passed.stage):
            states[first] = state
            state = behind(model, passed, state, first, layers)
        ends = state
    if len(ends) > len(rows):
        ends = (start(_hidden(ends), taken=taken_of_parts(rows, [states_of(e.spec.output).sequences for e in ends])),)
    fork = replace(states_of(calibration.starts[0].spec.output), sequences=sum(n for _, n in rows)).nbytes

    def chain(first: int, before: tuple[Step, ...], group: Mapping[int, Alternatives]) -> Step:
        begun = [group.get(i) for i in range(first, max(group, default=first - 1) + 1)]
        made = forks(
            model.rest, calibration.tokens, _hidden(before), model.layers[first:], tuple(a.sources if a else () for a in begun),
            against, shortlist if group else None, alternatives=[a.forks if a else None for a in begun],
            how=Chain(first, rows, passed.dtype, listed if group else 0),
        )  # fmt: skip
        return passed.bounded(made)

    chains = []
    for first, layers in _stages(model, passed.stage):
        of_stage = {i: alternatives[i] for i in range(first, first + len(layers)) if i in alternatives}
        chains += [chain(first, states[first], group) for group in groups(of_stage, max(1, HELD // fork), listed)]
    return measure(tuple(chains or [chain(len(model.layers), ends, {})]))


def _hidden(steps: tuple[Step, ...]) -> tuple[Part, ...]:
    return tuple(s.part(HIDDEN) for s in steps)


def _start_spec(starts: tuple[Any, ...], *, taken: list[int]) -> Spec:
    out = replace(states_of(starts[0]), sequences=sum(taken))
    return Spec(out, reads=out.nbytes, writes=out.nbytes, memory=3 * out.nbytes)


@step("calibrate.start", version=1, spec=_start_spec)
def start(context: Context, starts: tuple[Artifact, ...], *, taken: list[int]) -> None:
    """The hidden states of the first sequences of every shard, `taken` of each, as one file."""
    from moeflow.methods.calibrate import forking

    forking.write_rows(starts, taken, context.out / HIDDEN)


def _forks_spec(
    rest: RestSpec, matrix: TokensSpec, before: tuple[Any, ...], layers: tuple[LayerSpec, ...],
    sources: tuple[tuple[Any, ...], ...], against: tuple[Any, ...] = (), shortlist: Any = None,
    *, alternatives: list[Forks | None], how: Chain,
) -> Spec:  # fmt: skip
    states = replace(states_of(before[0]), sequences=sum(how.taken))
    states = replace(states, handed_on=Family.of(states.config).handed_on(states.length))
    reads = states.nbytes * (2 if against else 1) + sum(layer.nbytes for layer in layers)
    for which, several in zip_longest(alternatives, sources):  # of a shortlist's files it is not known which they are
        part = how.begun(which) / len(which.names) if which and which.kind == "files" else 1.0
        reads += round(part * sum(one.nbytes if isinstance(one, LayerSpec) else one["bytes"] for one in several or ()))
    reads += rest.head_bytes + header_bytes(rest.tensors) + matrix.tokens * 4
    count = sum(map(how.begun, alternatives))
    head, width = rest.loaded(how.dtype, head=True), int(rest.config["vocab_size"]) * 1024 * 4 * 6
    running = 2 * max((layer.nbytes + layer.loaded(how.dtype) for layer in layers), default=0)
    memory = (count + 7) * states.nbytes + max(running, 2 * rest.head_bytes + 2 * head + width)
    passed = passing(layers, states.length, how.dtype, handed_on=states.handed_on, copies=2) if layers else 0
    writes = 200 + 90 * count + 14 * (1 + count) * states.sequences
    begun = [*map(how.begun, alternatives), *[0] * (len(layers) - len(alternatives))]
    runs = [1 + sum(begun[: at + 1]) for at in range(len(layers))]  # of each layer: the model's, and its forks'
    done = operations.passing((layer for n, layer in zip(runs, layers, strict=True) for _ in range(n)), states, how.dtype)
    done = operations.together(done, operations.head(rest, (1 + count) * states.sequences * states.length, how.dtype))
    device = on_device(max(passed, head + width))
    return Spec({"bytes": writes}, reads=reads, writes=writes, operations=done, memory=memory, device=device)


@step("calibrate.forks", version=3, spec=_forks_spec, gpus=1)
def forks(
    context: Context, rest: Artifact, matrix: Artifact, before: tuple[Artifact, ...], layers: tuple[Artifact, ...],
    sources: tuple[tuple[Artifact, ...], ...], against: tuple[Artifact, ...] = (), shortlist: Artifact | None = None,
    *, alternatives: list[Forks | None], how: Chain,
) -> None:  # fmt: skip
    """How far the model's predictions move, and its loss, for every fork that begins in a stage: `Curves`, in nats per token.

    `before`: the unchanged model's hidden states before layer `how.first`, shard by shard, or all sequences as one; `layers`: that
    layer and all behind it; `sources`: for the layers in which forks begin, the artifacts that hold the alternatives: one of
    candidates for "sets", a layer for each name for "files", none if no layer needs any; `against`: the states behind the last
    layer of the model from which the divergence is measured, if that is not the unchanged one; `shortlist`: the alternatives that
    are measured, if not all. The unchanged model runs along, so that no chain waits for the end of another pass.
    """
    from moeflow.methods.calibrate import forking

    only = None if shortlist is None else Shortlist.read(shortlist).layers

    def stages() -> Iterator[forking.Stage]:
        for done, layer in enumerate(layers):
            which = alternatives[done] if done < len(alternatives) else None
            held = sources[done] if which and sources else ()
            whole = weights(held[-1], LAYER) if which and which.replaced else None
            named = None if only is None else only.get(how.first + done)
            yield forking.Stage(how.first + done, weights(layer, LAYER), forking.begun(which, held, named), whole)

    def taken_of(states: tuple[Artifact, ...]) -> dict[str, Any]:
        return forking.first_rows(states, how.taken if len(states) == len(how.rows) else [sum(how.taken)])

    count = sum(map(how.begun, alternatives))
    own, made = forking.through(
        read_config(rest), taken_of(before), stages(),
        forks=count, batch=at_most(context), dtype=how.dtype,
        progress=lambda done: context.progress(done, len(layers), "layers"),
    )  # fmt: skip
    goal = taken_of(against)[forking.HIDDEN] if against else None
    ids = np.load(matrix.file(TOKENS), mmap_mode="r")
    taken = np.concatenate([ids[first : first + count] for first, count in how.rows])
    forking.measured(rest, taken, own, made, goal, dtype=how.dtype).write(context.out)


def _measure_spec(chains: tuple[Mapping[str, Any], ...]) -> Spec:
    size = sum(chain["bytes"] for chain in chains)
    return Spec({"bytes": size}, reads=size, writes=size)


@step("calibrate.curves", version=3, spec=_measure_spec)
def measure(context: Context, chains: tuple[Artifact, ...]) -> None:
    """What several chains measured, as one `Curves`."""
    joined(map(Curves.read, chains)).write(context.out)
