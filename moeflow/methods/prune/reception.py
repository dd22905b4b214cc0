"""Compare combinations of expert sets over consecutive decoder layers by the output of the last (MoE-I², section 3.2).

Shapes are suffixes: N sequences (n of them at once), L positions, D model width.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moeflow.arch import Config
from moeflow.model.alternatives import Alternative, Kept, alternative_blocks, slices, watched, with_block
from moeflow.model.layout import Files
from moeflow.model.moved import arriving
from moeflow.model.passes import Progress, at_once, put, stream_of, taken
from moeflow.model.stream import HIDDEN, States, Stream

Combination = tuple[int, ...]
"""The index of each searched layer's set."""


@torch.inference_mode()
def losses(
    config: Config, layers: Sequence[tuple[int, Path | Files]], sets: Mapping[int, Sequence[Sequence[int]]],
    before: Path, behind: Path | None, *, batch: int, dtype: str, progress: Progress,
) -> dict[Combination, float]:  # fmt: skip
    """The Frobenius distance of the layers' output from the original's for every combination of `sets`, over a shard's tokens.

    `before`: the hidden states before the first layer; `behind`: the original model's behind the last. Without `behind`, the
    target is the output of these layers with all their experts.
    """
    stream, start = stream_of(config, dtype), load_file(before)
    count, length = start[HIDDEN].shape[:2]
    if behind is not None:
        goal_NLD = load_file(behind)[HIDDEN]
    else:
        goal_NLD = torch.empty_like(start[HIDDEN])
        for _, rows, y_nLD in _outputs(stream, config, layers, {}, start, batch):
            goal_NLD[rows] = y_nLD.cpu()
    squares: dict[Combination, float] = defaultdict(float)
    of_all, done = prod(len(s) for s in sets.values()) * count * length, 0
    for combination, rows, y_nLD in _outputs(stream, config, layers, sets, start, batch):
        difference_nLD = y_nLD.double() - goal_NLD[rows].to(stream.device).double()
        squares[combination] += float(difference_nLD.square().sum())
        done += len(y_nLD) * length
        progress(done, of_all, "tokens")
    return {combination: square**0.5 for combination, square in squares.items()}


def _outputs(
    stream: Stream, config: Config, layers: Sequence[tuple[int, Path | Files]], sets: Mapping[int, Sequence[Sequence[int]]],
    start: States, batch: int,
) -> Iterator[tuple[Combination, slice, Tensor]]:  # fmt: skip
    """The last layer's output for every combination and batch of sequences. Combinations that begin with the same sets share those
    layers' work; a layer without sets keeps all its experts."""
    nodes: dict[Combination, States] = {(): start}
    count, length = start[HIDDEN].shape[:2]
    for layer, tensors in arriving(layers, stream.device):
        module = stream.layer(tensors, layer)
        last = layer == layers[-1][0]
        alternatives: dict[str, Alternative] = {str(n): Kept(tuple(keep)) for n, keep in enumerate(sets.get(layer, ()))}
        moes = dict(alternative_blocks(tensors, config, layer, alternatives, device=stream.device, dtype=stream.dtype))
        size = at_once(stream, module, tensors, length, batch, copies=2)
        longer: dict[Combination, States] = {}
        for combination, states in nodes.items():
            names = [(*combination, int(n)) for n in moes] or [combination]
            for rows in slices(count, size):
                for name, behind in zip(
                    names, _behind(stream, module, layer, taken(states, rows, stream.device), moes), strict=True
                ):
                    if last:
                        yield name, rows, behind[HIDDEN]
                    else:
                        put(longer.setdefault(name, {}), behind, rows, count)
        nodes = longer


def _behind(
    stream: Stream, module: nn.Module, layer: int, states: States, moes: Mapping[str, Callable[[Tensor], Tensor]]
) -> Iterator[States]:
    """The states behind a layer with each of these MoE blocks in turn; with its own if there are none."""
    if not moes:
        yield stream.run(module, layer, states)
        return
    layer_as_it_is = watched(stream, module, layer, states)
    for moe in moes.values():
        if layer_as_it_is.adds:
            y_NLD = moe(layer_as_it_is.x_NLD.flatten(0, -2)).view(layer_as_it_is.residual_NLD.shape)
            hidden_NLD = layer_as_it_is.residual_NLD + y_NLD
        else:
            hidden_NLD = with_block(stream, module, layer, states, moe, pair=layer_as_it_is.pair)
        yield layer_as_it_is.behind | {HIDDEN: hidden_NLD}
