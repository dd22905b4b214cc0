"""Random layers and tokens, the same from a seed on every machine, on which the tensor paths of `gpu_paths` compute.

Shapes are suffixes: T tokens, D model width, F expert width, E experts.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moeflow.arch import Arch
from moeflow.model.moe import MLP, MoELayer
from moeflow.model.router import Router

D, F, E, TOP_K, T = 64, 48, 16, 4, 96
NAMES = {"router": "router", "experts": ("gate", "up", "down")}
SHARED = {"shared": NAMES["experts"]}
DEEPSEEK = SHARED | {"groups": True, "router_fp32": True}
ROUTERS: dict[str, dict[str, Any]] = {
    "mixtral": {"normalize": "always"},
    "qwen2_moe": SHARED | {"shared_gate": "shared gate"},
    "qwen3_moe": {},
    "olmoe": {"normalize": "never"},
    "phimoe": {"score": "sparsemixer", "normalize": "never"},
    "deepseek_v2": DEEPSEEK | {"normalize": "never", "group_score": "max"},
    "deepseek_v3": DEEPSEEK | {"score": "sigmoid", "group_score": "top2", "router_bias": "bias"},
}
ARCHS = {name: Arch(model_type=name, **(NAMES | how)) for name, how in ROUTERS.items()}
"""How the routers of seven families choose; the tensors' names are of no checkpoint."""


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(model_type: str = "mixtral", seed: int = 0) -> MoELayer:
    """A random layer of a family, with the shared expert, groups and biases that the family has."""
    arch, weighs = (ARCHS["mixtral"], True) if model_type == "weighs_input" else (ARCHS[model_type], False)
    arch = replace(arch, weighs_input=True) if weighs else arch
    top_k = {"phimoe": 2, "weighs_input": 1}.get(model_type, TOP_K)
    groups = 4 if arch.groups else 1
    bias_E = drawn(seed + 1, E) * 0.1 if arch.router_bias else None
    router = Router(arch, top_k, groups, groups // 2 or 1, arch.normalize != "never", 1.5, 0.01, bias_E)

    def mlp(at: int) -> MLP:
        gate, up, down = (drawn(seed + 10 * at + i, *s) * 0.1 for i, s in enumerate(((F, D), (F, D), (D, F)), 3))
        return MLP(gate, up, down)

    shared = mlp(E) if arch.shared else None
    gate_1D = drawn(seed + 2, 1, D) if arch.shared_gate else None
    return MoELayer(router, drawn(seed, E, D) * 0.3, tuple(map(mlp, range(E))), shared, gate_1D)


def clear_tokens(moe: MoELayer, count: int = T) -> Tensor:
    """Random tokens [T, D] whose experts a small change of the logits does not change, so that rounding chooses no other."""
    x_TD = drawn(7, 40 * count, D)
    clear_T = clearly(moe, x_TD)
    assert int(clear_T.sum()) >= count, "too few tokens are routed clearly"
    return x_TD[clear_T][:count]


def clearly(moe: MoELayer, x_TD: Tensor) -> Tensor:
    """Whether a small change of its logits leaves a token the same experts, [T]."""
    logits_TE = moe.logits(x_TD)
    chosen_TE = _chosen(moe.router, logits_TE)
    clear_T = torch.ones(len(x_TD), dtype=torch.bool)
    for seed in range(6):
        noise_TE = drawn(100 + seed, *logits_TE.shape) * 0.02 * logits_TE.std()
        clear_T &= (_chosen(moe.router, logits_TE + noise_TE) == chosen_TE).all(1)
    return clear_T


def _chosen(router: Router, logits_TE: Tensor) -> Tensor:
    return torch.zeros_like(logits_TE).scatter_(1, router.choose(logits_TE)[1], 1.0)
