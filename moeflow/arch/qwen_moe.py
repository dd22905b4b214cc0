"""Qwen1.5-MoE and Qwen2-MoE (a gated shared expert), Qwen3-MoE and OLMoE (none)."""

from typing import Any

from moeflow.arch.spec import Arch

MLP = "model.layers.{layer}.mlp"
NAMES: dict[str, Any] = {
    "router": MLP + ".gate.weight",
    "gate": MLP + ".experts.{expert}.gate_proj.weight",
    "up": MLP + ".experts.{expert}.up_proj.weight",
    "down": MLP + ".experts.{expert}.down_proj.weight",
}

QWEN2_MOE = Arch(
    model_type="qwen2_moe",
    shared=(
        MLP + ".shared_expert.gate_proj.weight",
        MLP + ".shared_expert.up_proj.weight",
        MLP + ".shared_expert.down_proj.weight",
    ),
    shared_gate=MLP + ".shared_expert_gate.weight",
    **NAMES,
)

QWEN3_MOE = Arch(model_type="qwen3_moe", **NAMES)

OLMOE = Arch(model_type="olmoe", **NAMES)
