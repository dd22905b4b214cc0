"""A random MoE layer for tests of the searches, and the errors of its subsets computed directly."""

import torch
from torch import Tensor

from moeflow.arch import Arch
from moeflow.model.moe import MLP, MoELayer
from moeflow.model.router import Router

NAMES = {"router": "", "experts": ("gate.{expert}", "up.{expert}", "down.{expert}")}
MIXTRAL = Arch(model_type="mixtral", normalize="always", **NAMES)
"""How a Mixtral's router chooses; the names are of no checkpoint."""


def layer(experts: int = 6, top_k: int = 2, arch: Arch = MIXTRAL, seed: int = 0, **router: object) -> MoELayer:
    draw = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    mlps = tuple(MLP(r(12, 8), r(12, 8), r(8, 12)) for _ in range(experts))
    return MoELayer(Router(arch, top_k=top_k, **router), r(experts, 8), mlps)  # type: ignore[arg-type]


@torch.inference_mode()
def squared_errors_direct(moe: MoELayer, x_TD: Tensor, mask_SE: Tensor, target_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What `squared_errors` computes, [S] and [], by running the whole layer once for every subset."""
    goal_TD = (moe(x_TD) if target_TD is None else target_TD).double()
    errors = [(moe(x_TD, allowed_E).double() - goal_TD).square().sum() for allowed_E in mask_SE]
    return torch.stack(errors), goal_TD.square().sum()
