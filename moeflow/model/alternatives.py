"""Run one decoder layer with alternatives to its MoE block: fewer experts, or the experts of another file.

Shapes are suffixes: T tokens, D model width.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeflow.arch import Config, Family
from moeflow.model.checkpoint import Tensors, read_moe
from moeflow.model.layout import Files
from moeflow.model.observe import first_of
from moeflow.model.stream import HIDDEN, States, Stream


@dataclass(frozen=True)
class Kept:
    """Only these experts stay."""

    experts: tuple[int, ...]


@dataclass(frozen=True)
class Without:
    """These experts are left out."""

    experts: tuple[int, ...]


Alternative = Kept | Without | Path | Files
"""What may replace a layer's MoE block. A path, or what is read like a folder, is another file of the same layer."""


def alternative_blocks(
    tensors: Tensors, config: Config, layer: int, alternatives: Mapping[str, Alternative],
    *, device: torch.device, dtype: torch.dtype,
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:  # fmt: skip
    """The name and the MoE block of each alternative, one after the other. Blocks with fewer experts share their tensors.

    Skips a `Without` whose experts the layer does not have or cannot spare.
    """
    if not alternatives:
        return
    whole = read_moe(tensors, config, layer).to(device=device, dtype=dtype)
    for name, alternative in alternatives.items():
        if not isinstance(alternative, Kept | Without):
            file = Tensors(alternative)
            if any(n.startswith(Family.of(config).moe(layer)) for n in file):
                yield name, read_moe(file, config, layer).to(device=device, dtype=dtype)
            else:
                yield name, torch.zeros_like  # the block is gone, and adds nothing
        elif isinstance(alternative, Without):
            gone = alternative.experts
            if max(gone) >= whole.num_experts or not whole.router.can_spare(whole.num_experts, len(gone)):
                continue
            # forbidden, not cut out, because the router's groups may then differ in size
            allowed_E = torch.ones(whole.num_experts, dtype=torch.bool, device=device)
            allowed_E[list(gone)] = False
            yield name, partial(whole, allowed_E=allowed_E)
        else:
            yield name, whole.keep(list(alternative.experts))


@dataclass(frozen=True)
class Seen:
    """What a decoder layer did: the states behind it, its MoE block's input, and the residual stream before the block."""

    behind: States
    x_NLD: Tensor
    residual_NLD: Tensor
    adds: bool  # the layer does nothing else with the block's output than to add it to the residual stream
    pair: bool  # the block returns more than its output


def watched(stream: Stream, module: nn.Module, layer: int, states: States) -> Seen:
    """Run a decoder layer, and see what its MoE block does."""
    family, inside = stream.family, dict[str, Any]()
    norm, block = module.get_submodule(family.arch.norm), module.get_submodule(family.arch.block)

    def hold(name: str) -> Callable[..., None]:
        return lambda _, args, named: inside.update({name: first_of(args, named)})

    hooks = [
        norm.register_forward_pre_hook(hold("residual"), with_kwargs=True),
        block.register_forward_pre_hook(hold("x"), with_kwargs=True),
        block.register_forward_hook(lambda _, args, out: inside.update(out=out)),
    ]
    try:
        behind = stream.run(module, layer, states)
    finally:
        for hook in hooks:
            hook.remove()
    residual_NLD = inside["residual"]
    sum_NLD = residual_NLD + first_of(inside["out"]).view(residual_NLD.shape)
    pair = isinstance(inside["out"], tuple)
    return Seen(behind, inside["x"], residual_NLD, torch.equal(sum_NLD, behind[HIDDEN]), pair)


def with_block(
    stream: Stream, module: nn.Module, layer: int, states: States, moe: Callable[[Tensor], Tensor], *, pair: bool
) -> Tensor:
    """The hidden states behind a decoder layer with another MoE block, for states before it."""
    name = stream.family.arch.block
    own = module.get_submodule(name)
    module.set_submodule(name, _Block(moe, pair))
    try:
        return stream.run(module, layer, states)[HIDDEN]
    finally:
        module.set_submodule(name, own)


class _Block(nn.Module):
    """Takes the place of a MoE block of transformers."""

    def __init__(self, moe: Callable[[Tensor], Tensor], pair: bool) -> None:
        super().__init__()
        self.moe, self.pair = moe, pair

    def forward(self, x_NLD: Tensor, *_: Any, **__: Any) -> Any:
        y_NLD = self.moe(x_NLD.flatten(0, -2)).view(x_NLD.shape)
        return (y_NLD, None) if self.pair else y_NLD


def slices(rows: int, size: int) -> Iterator[slice]:
    """Divide `rows` rows into slices of at most `size`."""
    for at in range(0, rows, size):
        yield slice(at, min(at + size, rows))
