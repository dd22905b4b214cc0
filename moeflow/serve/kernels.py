"""Whether vLLM has a kernel here for a checkpoint's packed experts: its own choice of one is asked, before a model is built."""

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, get_routing_method_type
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (
    CompressedTensorsWNA16MoEMethod,
)
from vllm.platforms import current_platform

from moeflow.arch import Family
from moeflow.serve.ways import packed_alike


def missing_kernel(model: Any) -> str:
    """Why vLLM has no kernel for the packed experts of this `ModelConfig` on this machine; empty if it has one, or needs none."""
    config = model.hf_config.to_dict()
    weights = packed_alike(config)
    if weights is None:
        return ""
    if current_platform.is_cpu() and model.dtype is not torch.bfloat16:
        return f"vLLM's kernels of packed experts on a processor compute in bfloat16, and {str(model.dtype)[6:]} is asked for"
    family = Family.of(config)
    experts, groups = family.num_experts, family.group_limit[0]
    biased = family.router_bias(family.moe_layers[0]) is not None
    scoring = "sigmoid" if family.arch.score == "sigmoid" else "softmax" if family.arch.score == "softmax" else "custom"
    moe = FusedMoEConfig(
        num_experts=experts, experts_per_token=family.top_k, hidden_dim=int(config["hidden_size"]),
        intermediate_size=family.expert_size or 0, num_local_experts=experts, num_logical_experts=experts,
        activation=MoEActivation.SILU, device=current_platform.device_type, in_dtype=model.dtype,
        routing_method=get_routing_method_type(scoring, family.top_k, family.normalizes, groups if groups > 1 else None, biased),
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
    )  # fmt: skip
    try:
        CompressedTensorsWNA16MoEMethod(QuantizationArgs(**weights), None, moe)
    except AssertionError:  # vLLM's way to say that a kernel wants groups
        return "vLLM's kernels of packed experts here need a scale for each group of weights"
    except (NotImplementedError, ValueError) as error:
        return f"vLLM has no kernel here for experts of {weights['num_bits']} bits: {' '.join(str(error).split())[:200]}"
    return ""
