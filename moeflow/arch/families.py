"""The families of checkpoints that moeflow can read: the names of their tensors on disk, and how their routers choose."""

from typing import Any

from moeflow.arch.spec import MATRICES, Arch

_MOE = "model.layers.{layer}.block_sparse_moe"
_MIXTRAL: dict[str, Any] = {
    "router": _MOE + ".gate.weight",
    "experts": tuple(f"{_MOE}.experts.{{expert}}.{matrix}.weight" for matrix in ("w1", "w3", "w2")),
}

# Mixtral 8x7B and 8x22B
MIXTRAL = Arch(model_type="mixtral", normalize="always", memory=(("block_sparse_moe.", "mlp."),), biases=(), **_MIXTRAL)

# Phi-3.5-MoE, which took over Mixtral's names on disk
PHIMOE = Arch(
    model_type="phimoe",
    score="sparsemixer",
    normalize="never",
    memory=(("block_sparse_moe.gate.", "mlp.router."), ("block_sparse_moe.", "mlp.")),
    block_router="router",
    norm_bias=True,
    **_MIXTRAL,
)

_MLP = "model.layers.{layer}.mlp"


def _matrices(stem: str) -> tuple[str, ...]:
    return tuple(f"{stem}.{matrix}_proj.weight" for matrix in MATRICES)


_QWEN: dict[str, Any] = {"router": _MLP + ".gate.weight", "experts": _matrices(_MLP + ".experts.{expert}")}

# Qwen1.5-MoE and Qwen2-MoE: a shared expert with a gate
QWEN2_MOE = Arch(
    model_type="qwen2_moe",
    shared=_matrices(_MLP + ".shared_expert"),
    shared_gate=_MLP + ".shared_expert_gate.weight",
    biases=("q_proj", "k_proj", "v_proj"),
    biased=("qkv_bias", True),
    **_QWEN,
)

QWEN3_MOE = Arch(model_type="qwen3_moe", qk_norm="head", **_QWEN)

OLMOE = Arch(model_type="olmoe", qk_norm="all", **_QWEN)

# DeepSeek: shared experts, dense first layers, and a router with groups
_DEEPSEEK: dict[str, Any] = _QWEN | {
    "shared": _matrices(_MLP + ".shared_experts"),
    "groups": True,
    "router_fp32": True,
    "drop_score": "routing_weight",
    "latent": True,
    "biases": ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"),
}

DEEPSEEK_V2 = Arch(model_type="deepseek_v2", normalize="never", group_score="max", **_DEEPSEEK)

# sigmoid scores, with a bias for the choice
DEEPSEEK_V3 = Arch(
    model_type="deepseek_v3",
    score="sigmoid",
    group_score="top2",
    router_bias=_MLP + ".gate.e_score_correction_bias",
    **_DEEPSEEK,
)

ALIASES = {"kimi_k2": "deepseek_v3"}
"""Model types that transformers does not know, and the one whose architecture they have. A result keeps its source's name."""

FAMILIES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, PHIMOE, DEEPSEEK_V2, DEEPSEEK_V3)
