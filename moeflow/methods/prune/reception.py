"""Compare combinations of expert sets over consecutive decoder layers by the output of the last (MoE-I², section 3.2).

Shapes are suffixes: N sequences (n of them at once), L positions, D model width.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
    """The Frobenius distance of the layers' output from the original's for every combination of `sets`, over all tokens.

    `before`: the hidden states before the first layer, shard by shard; `behind`: the original model's behind the last. Without
    `behind`, the target is the output of these layers with all their experts.
    """
    stream = stream_of(config, dtype)
    total: dict[Combination, float] = defaultdict(float)
    for done, file in enumerate(before):
        start_NLD = load_file(file)["hidden_NLD"]
        if behind:
            goal_NLD = load_file(behind[done])["hidden_NLD"]
        else:
            goal_NLD = torch.empty_like(start_NLD)
            for _, rows, y_nLD in _outputs(stream, config, layers, {}, start_NLD, batch):
                goal_NLD[rows] = y_nLD.cpu()
        of_shard: dict[Combination, float] = defaultdict(float)
        for combination, rows, y_nLD in _outputs(stream, config, layers, sets, start_NLD, batch):
            difference_nLD = y_nLD.double() - goal_NLD[rows].to(stream.device).double()
            of_shard[combination] += float(difference_nLD.square().sum())
        for combination, square in of_shard.items():
            total[combination] += square
        progress(done + 1, len(before), "shards")
    return {combination: square**0.5 for combination, square in total.items()}


def _outputs(
    stream: Stream, config: Config, layers: Sequence[tuple[int, Path]], sets: Mapping[int, Sequence[Sequence[int]]],
    start_NLD: Tensor, batch: int,
) -> Iterator[tuple[Combination, slice, Tensor]]:  # fmt: skip
    """The last layer's output for every combination and batch of sequences. Combinations that begin with the same sets share those
    layers' work; a layer without sets keeps all its experts."""
    nodes: dict[Combination, Tensor] = {(): start_NLD}
    for layer, file in layers:
        tensors = Tensors(file)
        module = stream.layer(tensors, layer)
        last = layer == layers[-1][0]
        alternatives: dict[str, Alternative] = {str(n): Kept(tuple(keep)) for n, keep in enumerate(sets.get(layer, ()))}
        moes = dict(alternative_blocks(tensors, config, layer, alternatives, device=stream.device, dtype=stream.dtype))
        longer: dict[Combination, Tensor] = {}
        for combination, states_NLD in nodes.items():
            names = [(*combination, int(n)) for n in moes] or [combination]
            longer |= {name: torch.empty_like(states_NLD) for name in names if not last}
            for rows in slices(len(states_NLD), batch):
                h_nLD = states_NLD[rows].to(stream.device)
                with watched(module, stream.family) as inside:
                    out_nLD = module(h_nLD, **stream.arguments(layer, h_nLD))
                outputs = [inside["residual"] + m(inside["x"].flatten(0, -2)).view(h_nLD.shape) for m in moes.values()] or [out_nLD]
                for name, y_nLD in zip(names, outputs, strict=True):
                    if last:
                        yield name, rows, y_nLD
                    else:
                        longer[name][rows] = y_nLD.cpu()
        nodes = longer
