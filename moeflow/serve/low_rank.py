"""Experts with low-rank matrices inside vLLM's own model classes: its router, its shared experts, and moeflow's routed experts.

Shapes are suffixes: T tokens, k experts a token, D model width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts as Whole
from vllm.utils.torch_utils import direct_register_custom_op

from moeflow.model.factors import Form
from moeflow.model.formats import Format
from moeflow.model.routed_experts import RoutedExperts


class LowRankExperts(Whole):
    """Stands where vLLM's class has the fused experts of a layer; `own` has the experts, whole and low-rank ones."""

    own: RoutedExperts

    def __init__(self, *positional: Any, format: Format, gated: bool, **named: Any) -> None:
        self.format, self.form = format, Form(gated=gated)
        super().__init__(*positional, **named)

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> FusedMoEMethodBase:
        return Factors(moe_config)


class Factors(FusedMoEMethodBase):
    """How vLLM makes and calls them: it has chosen each token's experts before."""

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int, params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        made = RoutedExperts(layer.format, hidden_size, intermediate_size_per_partition, silu, form=layer.form)
        layer.own = made.to(params_dtype).requires_grad_(False)
        layer.own_name = f"{layer.layer_name}.own"
        get_current_vllm_config().compilation_config.static_forward_context[layer.own_name] = layer.own

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any, shared_experts_input: Any
    ) -> Tensor:
        """[T, D], the weighted sums of the experts `topk_ids` [T, k] of each token."""
        y_TD: Tensor = torch.ops.vllm.moeflow_experts(x, topk_ids, topk_weights, layer.own_name)
        return y_TD


def _experts(x_TD: Tensor, index_Tk: Tensor, weights_Tk: Tensor, name: str) -> Tensor:
    y_TD: Tensor = get_forward_context().no_compile_layers[name](x_TD, index_Tk.long(), weights_Tk)
    return y_TD


def _experts_fake(x_TD: Tensor, index_Tk: Tensor, weights_Tk: Tensor, name: str) -> Tensor:
    return torch.empty_like(x_TD)


# one operation for torch.compile, which could not look inside: how many rows an expert has is not known before
direct_register_custom_op(op_name="moeflow_experts", op_func=_experts, fake_impl=_experts_fake)
