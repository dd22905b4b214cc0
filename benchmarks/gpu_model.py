"""Random tensors under the names that a config.json asks for: one decoder layer, and what is around the layers."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.real_sizes import experts_of, tensors_of
from moeflow.arch import Family, layer_of

Config = dict[str, Any]


def random_layer(
    config: Config, *, device: str = "cpu", dtype: torch.dtype = torch.float32, scale: float = 0.02
) -> dict[str, Tensor]:
    """The tensors of layer 0; norms are ones."""
    family = Family.of(config)
    shapes = {n: shape for n, shape in tensors_of(config).items() if n.startswith(family.prefix(0))} | experts_of(family, 0)
    return {n: _made(n, shape, at, device, dtype, scale) for at, (n, shape) in enumerate(shapes.items())}


def random_rest(config: Config) -> dict[str, Tensor]:
    """Embedding, final norm and head."""
    shapes = {n: shape for n, shape in tensors_of(config).items() if layer_of(n) is None}
    return {n: _made(n, shape, 1000 + at, "cpu", torch.float32, 0.5) for at, (n, shape) in enumerate(shapes.items())}


def _made(name: str, shape: Any, seed: int, device: str, dtype: torch.dtype, scale: float) -> Tensor:
    if "norm" in name:
        return torch.ones(shape, device=device, dtype=dtype)
    draw = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=draw, device=device, dtype=dtype) * scale
