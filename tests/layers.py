"""A random MoE layer for tests of the searches."""

import torch
from torch import Tensor

from moeflow.arch import MIXTRAL, Arch
from moeflow.model.moe import MLP, MoELayer
from moeflow.model.router import Router


def layer(experts: int = 6, top_k: int = 2, arch: Arch = MIXTRAL, seed: int = 0, **router: object) -> MoELayer:
    draw = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    mlps = tuple(MLP(r(12, 8), r(12, 8), r(8, 12)) for _ in range(experts))
    return MoELayer(Router(arch, top_k=top_k, **router), r(experts, 8), mlps)  # type: ignore[arg-type]
