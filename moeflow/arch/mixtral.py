"""Mixtral 8x7B and 8x22B, and Phi-3.5-MoE, which took over their names on disk."""

from typing import Any

from moeflow.arch.spec import Arch

_MOE = "model.layers.{layer}.block_sparse_moe"
_NAMES: dict[str, Any] = {
    "router": _MOE + ".gate.weight",
    "gate": _MOE + ".experts.{expert}.w1.weight",
    "up": _MOE + ".experts.{expert}.w3.weight",
    "down": _MOE + ".experts.{expert}.w2.weight",
}

MIXTRAL = Arch(model_type="mixtral", normalize="always", memory=(("block_sparse_moe.", "mlp."),), **_NAMES)

PHIMOE = Arch(
    model_type="phimoe",
    score="sparsemixer",
    normalize="never",
    memory=(("block_sparse_moe.gate.", "mlp.router."), ("block_sparse_moe.", "mlp.")),
    block_router="router",
    **_NAMES,
)
