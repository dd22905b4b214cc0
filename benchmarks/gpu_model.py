"""Random tensors under the names that a config.json asks for: one decoder layer, and what is around the layers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moeflow.arch import Family
from moeflow.arch.shapes import attention_shapes, mlp_shapes, norm_shapes, rest_shapes, shared_shapes

Config = dict[str, Any]


def random_layer(
    config: Config, *, device: str = "cpu", dtype: torch.dtype = torch.float32, scale: float = 0.02
) -> dict[str, Tensor]:
    """The tensors of layer 0; norms are ones."""
    return {n: _made(n, shape, at, device, dtype, scale) for at, (n, shape) in enumerate(_of_layer(Family.of(config)))}


def random_rest(config: Config) -> dict[str, Tensor]:
    """Embedding, final norm and head."""
    shapes = rest_shapes(Family.of(config))
    return {n: _made(n, shape, 1000 + at, "cpu", torch.float32, 0.5) for at, (n, shape) in enumerate(shapes.items())}


def _of_layer(family: Family) -> Iterator[tuple[str, Any]]:
    yield from attention_shapes(family, 0).items()
    prefix = family.prefix(0)
    for norm in ("input_layernorm.", f"{family.arch.norm}."):
        yield from norm_shapes(family, prefix + norm).items()
    width, inner, experts = family.size("hidden_size"), family.expert_size, family.num_experts
    yield family.router(0), (experts, width)
    for e in range(experts):
        yield from mlp_shapes(family, family.expert(0, e), inner).items()
    yield from shared_shapes(family, 0).items()


def _made(name: str, shape: Any, seed: int, device: str, dtype: torch.dtype, scale: float) -> Tensor:
    if "norm" in name:
        return torch.ones(shape, device=device, dtype=dtype)
    draw = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=draw, device=device, dtype=dtype) * scale
