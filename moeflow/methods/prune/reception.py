"""Compare combinations of expert sets over consecutive decoder layers by the output of the last (MoE-I², section 3.2).

Shapes are suffixes: N sequences (n of them at once), L positions, D model width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from moeflow.arch import Config
from moeflow.model.alternatives import Alternative, Kept, alternative_blocks, slices, watched
from moeflow.model.checkpoint import Tensors
from moeflow.model.passes import Progress, stream_of
from moeflow.model.stream import Stream

Combination = tuple[int, ...]
"""The index of each searched layer's set."""


@torch.inference_mode()
def losses(
    config: Config, layers: Sequence[tuple[int, Path]], sets: Mapping[int, Sequence[Sequence[int]]],
    before: Sequence[Path], behind: Sequence[Path], *, batch: int, dtype: str, progress: Progress,
) -> dict[Combination, float]:  # fmt: skip
    """The Frobenius distance of the block's output from the original's for every combination of `sets`, over all tokens.

    `before`: the hidden states before the block, shard by shard; `behind`: the original model's behind it. Without `behind`, the
    target is the output of the block with all its experts.
    """
    stream = stream_of(config, dtype)
    total: dict[Combination, float] = {}
    for done, file in enumerate(before):
        start_NLD = load_file(file)["hidden_NLD"]
        goal_NLD = load_file(behind[done])["hidden_NLD"] if behind else _through(stream, layers, start_NLD, batch)
        for combination, square in _walk(stream, config, layers, sets, start_NLD, goal_NLD, batch).items():
            total[combination] = total.get(combination, 0.0) + square
        progress(done + 1, len(before), "shards")
    return {combination: square**0.5 for combination, square in total.items()}


def _through(stream: Stream, layers: Sequence[tuple[int, Path]], start_NLD: Tensor, batch: int) -> Tensor:
    states_NLD = start_NLD.clone()
    for layer, file in layers:
        module = stream.layer(Tensors(file), layer)
        for rows in slices(len(states_NLD), batch):
            h_nLD = states_NLD[rows].to(stream.device)
            states_NLD[rows] = module(h_nLD, **stream.arguments(layer, h_nLD)).cpu()
    return states_NLD


def _walk(
    stream: Stream, config: Config, layers: Sequence[tuple[int, Path]], sets: Mapping[int, Sequence[Sequence[int]]],
    start_NLD: Tensor, goal_NLD: Tensor, batch: int,
) -> dict[Combination, float]:  # fmt: skip
    """The squared distance of every combination. Combinations that begin with the same sets share those layers' work."""
    nodes: dict[Combination, Tensor] = {(): start_NLD}
    errors: dict[Combination, float] = {}
    for layer, file in layers:
        tensors = Tensors(file)
        module = stream.layer(tensors, layer)
        last = layer == layers[-1][0]
        alternatives: dict[str, Alternative] = {str(n): Kept(tuple(keep)) for n, keep in enumerate(sets.get(layer, ()))}
        moes = dict(alternative_blocks(tensors, config, layer, alternatives, device=stream.device, dtype=stream.dtype))
        longer: dict[Combination, Tensor] = {}
        for combination, states_NLD in nodes.items():
            names = [(*combination, int(n)) for n in moes] or [combination]
            for name in names:
                longer[name] = torch.empty(0) if last else torch.empty_like(states_NLD)
            for rows in slices(len(states_NLD), batch):
                h_nLD = states_NLD[rows].to(stream.device)
                with watched(module, stream.family) as inside:
                    out_nLD = module(h_nLD, **stream.arguments(layer, h_nLD))
                outputs = [inside["residual"] + m(inside["x"].flatten(0, -2)).view(h_nLD.shape) for m in moes.values()] or [out_nLD]
                for name, y_nLD in zip(names, outputs, strict=True):
                    if last:
                        difference_nLD = y_nLD.double() - goal_NLD[rows].to(stream.device).double()
                        errors[name] = errors.get(name, 0.0) + float(difference_nLD.square().sum())
                    else:
                        longer[name][rows] = y_nLD.cpu()
        nodes = longer
    return errors
