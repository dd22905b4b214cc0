"""DeepSeek-V2 (softmax, group-limited) and DeepSeek-V3 (sigmoid with a bias for the choice): shared experts, dense first layers."""

from moeflow.arch.qwen_moe import MLP, NAMES
from moeflow.arch.spec import Arch

_SHARED = (
    MLP + ".shared_experts.gate_proj.weight",
    MLP + ".shared_experts.up_proj.weight",
    MLP + ".shared_experts.down_proj.weight",
)

DEEPSEEK_V2 = Arch(
    model_type="deepseek_v2",
    shared=_SHARED,
    normalize="never",
    groups=True,
    group_score="max",
    router_fp32=True,
    drop_score="routing_weight",
    **NAMES,
)

DEEPSEEK_V3 = Arch(
    model_type="deepseek_v3",
    shared=_SHARED,
    score="sigmoid",
    groups=True,
    group_score="top2",
    router_fp32=True,
    drop_score="routing_weight",
    router_bias=MLP + ".gate.e_score_correction_bias",
    **NAMES,
)
