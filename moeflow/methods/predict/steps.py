"""Multi-token prediction: what the layers behind a model record of a calibration's text, so that they are pruned by it.

DeepSeek-V3 (arXiv 2412.19437), section 2.2.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from moeflow.arch import Family
from moeflow.methods.graph import HIDDEN, REST, TOKENS, Calibration, at_most
from moeflow.model import operations
from moeflow.model.layout import LAYER, file_of, read_config
from moeflow.model.memory import on_device, passing
from moeflow.model.spec import HiddenSpec, LayerSpec, ObservedSpec, Recording, RestSpec, TokensSpec
from moeflow.sources.elsewhere import weights
from moeflow.step import Artifact, Context, Spec, step


def predicted(calibration: Calibration) -> Calibration:
    """The calibration with what its model's prediction layers record, if they are to be pruned; otherwise it as it is.

    They see the text of every shard behind the calibrated model, and record as much of it as the decoder layers.
    """
    model, passed = calibration.model, calibration.passed
    if model.mtp != "prune" or not model.extra:
        return calibration
    calibration.check_states("mtp=prune")
    numbers, recording = model.prediction_layers, Recording(calibration.recorded, passed.per_expert)
    shards = tuple(
        passed.bounded(
            observe(
                model.essential, model.rest.part(REST), calibration.tokens, end, model.extra,
                first=at * passed.shard, recording=recording, dtype=passed.dtype,
            )
        )
        for at, end in enumerate(calibration.ends)
    )  # fmt: skip
    return replace(calibration, predicted={i: tuple(s.part(file_of(i)) for s in shards) for i in numbers})


def _states(spec: Any) -> HiddenSpec:
    return spec.hidden if isinstance(spec, ObservedSpec) else spec


def _observe_spec(
    config: RestSpec, rest: RestSpec, tokens: TokensSpec, hidden: Any, layers: tuple[LayerSpec, ...],
    *, first: int, recording: Recording, dtype: str,
) -> Spec:  # fmt: skip
    states = _states(hidden)
    positions = states.length - 1
    if positions < len(layers):
        raise ValueError(
            f"sequences of {states.length} tokens are too short for {len(layers)} multi-token-prediction layers, of which each "
            f"looks one token further; make them {len(layers) + 1} tokens at least"
        )
    count, kept, most, writes = states.sequences * positions, 0, 0, 0
    row = int(states.config["hidden_size"]) * states.itemsize
    for layer in layers:
        layer.check_routing("prune")
        kept = min(count, recording.inputs)
        rows = min(count, kept + recording.per_expert * layer.experts)
        most = max(most, rows)
        writes += rows * (row + 8) + count * layer.experts * 4 + 8 * 7 * layer.experts + 1400
    loaded = rest.loaded(dtype, head=False)
    reads = states.nbytes + loaded + sum(layer.nbytes for layer in layers)
    memory = max(layer.nbytes + 2 * layer.loaded(dtype) for layer in layers) + 2 * loaded + 6 * states.nbytes + writes
    device = on_device(passing(layers, states.length, dtype, recorded=True) + loaded)
    out = ObservedSpec(states, kept, most, tuple(layer.layer for layer in layers))
    done = operations.passing(layers, states, dtype)
    return Spec(out, reads=reads, writes=writes, operations=done, memory=memory, device=device)


@step("predict.observe", version=1, spec=_observe_spec, gpus=1)
def observe(
    context: Context, config: Artifact, rest: Artifact, tokens: Artifact, hidden: Artifact, layers: tuple[Artifact, ...],
    *, first: int, recording: Recording, dtype: str,
) -> None:  # fmt: skip
    """Run the prediction layers over the hidden states of a shard behind the last decoder layer; writes for each what it recorded.

    `first`: the shard's first sequence among `tokens`.
    """
    import torch

    from moeflow.model import prediction

    read = read_config(config)
    ids_NL = torch.from_numpy(np.load(tokens.file(TOKENS))[first:].astype(np.int64))
    numbered = [(Family.of(read).num_layers + at, weights(layer, LAYER)) for at, layer in enumerate(layers)]
    prediction.observe(
        read, rest, ids_NL, hidden.file(HIDDEN), numbered, context.out,
        batch=at_most(context), dtype=dtype, recording=recording, progress=context.progress,
    )  # fmt: skip
