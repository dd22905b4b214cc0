"""What each layer's alternatives cost the whole model: one pass over the text that forks at every layer.

A layer's own error is not the goal: what counts is how far the model's predictions move when one layer alone is changed. At each
layer the pass forks once for every alternative of that layer, and every fork goes on through the unchanged layers behind. So the
checkpoint is read once for each shard of text, not once for each layer and alternative.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moeflow.methods.calibrate import HIDDEN, Calibration
from moeflow.methods.importance import read_importance, write_importance
from moeflow.model.layout import read_config
from moeflow.model.spec import ForkSpec, HiddenSpec, LayerSpec, ObservedSpec, RestSpec, TokensSpec, header_bytes
from moeflow.step import Artifact, Context, Spec, Step, step

CURVES = "curves.json"
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


@step("sweep.start", version=1, spec=_start_spec)
def start(context: Context, *starts: Artifact, taken: list[int]) -> None:
    """The hidden states of the first sequences of every shard, `taken` of each, before the first layer, as one file."""
    from moeflow.methods import forking

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


@step("sweep.forks", version=1, spec=_forks_spec, gpus=1)
def forks(
    context: Context, config: Artifact, given: Artifact, *inputs: Artifact,
    layers: list[int], kinds: list[str], names: list[list[str]], batch: int, dtype: str,
) -> None:  # fmt: skip
    """The hidden states behind consecutive `layers`, of the model as it is and of every fork that began before or begins here.

    One file each. `inputs`: the layers' files, and then what holds the alternatives of each, in order.
    """
    from moeflow.methods import forking
    from moeflow.methods.candidates import read_candidates

    files, rest = inputs[: len(layers)], list(inputs[len(layers) :])
    alternatives: list[dict[str, Any]] = []
    for kind, found in zip(kinds, names, strict=True):
        if kind == SETS:
            counts = read_candidates(rest.pop(0))["counts"]
            alternatives.append({name: counts[name]["best"][0]["keep"] for name in found})
        elif kind == FILES:
            alternatives.append({name: rest.pop(0).file("layer.safetensors") for name in found})
        else:
            alternatives.append({name: -1 - int(name) for name in found})
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


@step("sweep.measure", version=1, spec=_measure_spec, gpus=1)
def measure(context: Context, rest: Artifact, matrix: Artifact, end: Artifact, *, rows: list[list[int]], dtype: str) -> None:
    """How far the predictions of every fork are from the unchanged model's, and its loss, in nats per token, as `curves.json`.

    `rows`: which sequences of the token matrix the states are of, as runs of (first, count).
    """
    from moeflow.methods import forking

    ids = np.load(matrix.file("tokens.npy"), mmap_mode="r")
    taken = np.concatenate([ids[first : first + count] for first, count in rows])
    found = forking.measured(rest, taken, end, dtype=dtype, progress=context.progress)
    (context.out / CURVES).write_text(json.dumps(found, indent=1) + "\n")


def read_curves(artifact: Artifact) -> dict[str, Any]:
    """What `measure` wrote: the divergence by layer and alternative under "curves", the loss of each under "losses"."""
    return json.loads(artifact.read(CURVES, 0, artifact.size(CURVES)))


def _lm_spec(found: Any, recon: Any, *, layer: int) -> Spec:
    return Spec(recon, reads=found["bytes"] + recon["bytes"], writes=recon["bytes"])


@step("search.importance_lm", version=1, spec=_lm_spec)
def lm_loss(context: Context, found: Artifact, recon: Artifact, *, layer: int) -> None:
    """How much the model's loss grows when one expert of a layer is left out, for each expert, as `importance.json`.

    `recon`: the same layer's importance by its own output, which knows how many tokens each expert got.
    """
    losses, tokens = read_curves(found), read_importance(recon)["tokens"]
    without = losses["losses"].get(str(layer), {})
    importance = [max(0.0, without.get(str(e), losses["loss"]) - losses["loss"]) for e in range(len(tokens))]
    write_importance(context, layer, importance, tokens)
