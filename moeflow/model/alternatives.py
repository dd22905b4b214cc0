"""Run one decoder layer with alternatives to its MoE block: fewer experts, or the experts of another file.

Shapes are suffixes: T tokens, D model width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from moeflow.arch import Config, Family
from moeflow.model.checkpoint import Tensors, read_moe


@dataclass(frozen=True)
class Kept:
    """Only these experts stay."""

    experts: tuple[int, ...]


@dataclass(frozen=True)
class Without:
    """One expert is left out."""

    expert: int


Alternative = Kept | Without | Path
"""What may replace a layer's MoE block. A path is another file of the same layer."""


def alternative_blocks(
    tensors: Tensors, config: Config, layer: int, alternatives: Mapping[str, Alternative],
    *, device: torch.device, dtype: torch.dtype,
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:  # fmt: skip
    """The name and the MoE block of each alternative, one after the other. Blocks with fewer experts share their tensors.

    Skips a `Without` whose expert the layer does not have or cannot spare.
    """
    if not alternatives:
        return
    whole = read_moe(tensors, config, layer).to(device=device, dtype=dtype)
    for name, alternative in alternatives.items():
        if isinstance(alternative, Path):
            yield name, read_moe(Tensors(alternative), config, layer).to(device=device, dtype=dtype)
        elif isinstance(alternative, Without):
            if alternative.expert >= whole.num_experts or not whole.router.can_spare(whole.num_experts):
                continue
            # forbidden, not cut out, because the router's groups may then differ in size
            allowed_E = torch.ones(whole.num_experts, dtype=torch.bool, device=device)
            allowed_E[alternative.expert] = False
            yield name, partial(whole, allowed_E=allowed_E)
        else:
            yield name, whole.keep(list(alternative.experts))


@contextmanager
def watched(layer: nn.Module, family: Family) -> Iterator[dict[str, Tensor]]:
    """Watch a decoder layer: after each forward pass the dictionary has the MoE block's input "x", and "residual", the residual
    stream that the block's output is added to."""
    states: dict[str, Tensor] = {}
    hooks = [
        layer.get_submodule(family.arch.norm).register_forward_pre_hook(lambda _, args: states.__setitem__("residual", args[0])),
        layer.get_submodule(family.arch.block).register_forward_pre_hook(lambda _, args: states.__setitem__("x", args[0])),
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def slices(rows: int, size: int) -> Iterator[slice]:
    """Divide `rows` rows into slices of at most `size`."""
    for at in range(0, rows, size):
        yield slice(at, min(at + size, rows))
