"""One decoder layer whose MoE block is replaced by alternatives: fewer experts, or those of another file.

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
"""What a layer may be instead of what it is; a path is another file of the same layer."""


def alternative_blocks(
    tensors: Tensors, config: Config, layer: int, alternatives: Mapping[str, Alternative],
    *, device: torch.device, dtype: torch.dtype,
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:  # fmt: skip
    """One layer's MoE block as each alternative has it, one after the other; those with fewer experts share their tensors.

    An expert that the layer does not have, or cannot do without, is not left out: its alternative is missing from the answer.
    """
    if not alternatives:
        return
    whole = read_moe(tensors, config, layer).to(device=device, dtype=dtype)
    for name, given in alternatives.items():
        if isinstance(given, Path):
            yield name, read_moe(Tensors(given), config, layer).to(device=device, dtype=dtype)
        elif isinstance(given, Without):
            if given.expert >= whole.num_experts or not whole.router.can_spare(whole.num_experts):
                continue
            # forbidden, not cut out: what is left need not be as many in every group of the router
            allowed_E = torch.ones(whole.num_experts, dtype=torch.bool, device=device)
            allowed_E[given.expert] = False
            yield name, partial(whole, allowed_E=allowed_E)
        else:
            yield name, whole.keep(list(given.experts))


@contextmanager
def watched(layer: nn.Module, family: Family) -> Iterator[dict[str, Tensor]]:
    """What goes into a decoder layer's MoE block, and the residual stream that its output is added to."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.get_submodule(family.arch.norm).register_forward_pre_hook(lambda _, args: seen.__setitem__("residual", args[0])),
        layer.get_submodule(family.arch.block).register_forward_pre_hook(lambda _, args: seen.__setitem__("x", args[0])),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def slices(rows: int, size: int) -> Iterator[slice]:
    for at in range(0, rows, size):
        yield slice(at, min(at + size, rows))
