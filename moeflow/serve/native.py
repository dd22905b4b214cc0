"""The native way: vLLM's own class of a family, with each layer's own number of experts, whole or low-rank.

While it is built, the names by which its module makes routers and fused experts stand for ones that put in the layer's own number,
and moeflow's own experts where some are low-rank.
"""

import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

from moeflow.arch import COMPRESSED, Family
from moeflow.model.formats import Format, layer_formats, some
from moeflow.serve import traffic
from moeflow.serve.checks import check
from moeflow.serve.low_rank import LowRankExperts
from moeflow.serve.pieces import Pieces

CLASSES = {
    "mixtral": "mixtral:MixtralForCausalLM",
    "qwen2_moe": "qwen2_moe:Qwen2MoeForCausalLM",
    "qwen3_moe": "qwen3_moe:Qwen3MoeForCausalLM",
    "olmoe": "olmoe:OlmoeForCausalLM",
    "phimoe": "phimoe:PhiMoEForCausalLM",
    "deepseek_v2": "deepseek_v2:DeepseekV2ForCausalLM",
    "deepseek_v3": "deepseek_v2:DeepseekV3ForCausalLM",
}
"""The module of vllm.model_executor.models, and the class in it, of each family."""

ROUTER, EXPERTS = "GateLinear", "FusedMoEFactory"
"""The names by which vLLM's modules make a router and fused experts, since 0.31."""

SAID: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}
"""What vLLM's classes read in a configuration where transformers takes it for granted."""

GENERAL = """'{"moeflow_way": "general"}'"""
"""What asks for the general way, for a message."""

_building = Lock()  # the names belong to the process


@cache
def native_class(model_type: str) -> Any:
    """The class that makes models of this type of checkpoints. Raises ValueError if vLLM has other names for its parts."""
    family = model_type.removeprefix(COMPRESSED)
    module_name, _, name = CLASSES[family].partition(":")
    module = importlib.import_module(f"vllm.model_executor.models.{module_name}")
    if absent := [n for n in (ROUTER, EXPERTS) if not hasattr(module, n)]:
        raise ValueError(
            f"{module.__name__} of this vLLM has no {absent[0]}: the native way knows 0.31 and 0.32; take --hf-overrides {GENERAL}"
        )
    base: Any = getattr(module, name)

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        check(vllm_config)
        _tell_of_fused(vllm_config.quant_config, type(self))
        for key, value in SAID.get(family, {}).items():
            setattr(config, key, value)
        plain = config.to_dict()
        self.checkpoint, self.moe_family = vllm_config.model_config.model, Family.of(plain)
        with _formats_of(module, self.moe_family, layer_formats(plain)):
            base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        traffic.record_runners(self, vllm_config)

    def load_weights(self: Any, weights: Any) -> set[str]:
        pieces, own = Pieces(self.moe_family), set()
        for name, experts in self.named_modules():
            if isinstance(experts, LowRankExperts):
                pieces.add(_layer_at(name), experts.format, experts.own)
                own |= {f"{name}.{n}" for n, _ in experts.named_parameters()}
        loaded: set[str] = own | base.load_weights(self, ((n, t) for n, t in weights if not pieces.take(n, t)))
        pieces.check_whole(self.checkpoint)
        if absent := sorted({n for n, _ in self.named_parameters()} - loaded - _scales_of_the_cache(self)):
            raise ValueError(
                f"vLLM's class of a {family} has {some(absent)}, which the checkpoint has not; take --hf-overrides {GENERAL}"
            )
        return loaded

    return type(base.__name__, (base,), {"__module__": __name__, "__init__": __init__, "load_weights": load_weights})


def _tell_of_fused(quantization: Any, made: type) -> None:
    """Tell what reads a quantization_config which matrices this class fuses, as vLLM does it for the class that it makes itself: it
    takes a fused one, such as a dense layer's gate and up, for packed otherwise."""
    from vllm.model_executor.model_loader.utils import configure_quant_config

    if quantization is not None:
        configure_quant_config(quantization, made)


def _scales_of_the_cache(model: Any) -> set[str]:
    """The parameters by which attention packs keys and values, where a model is packed: no checkpoint of moeflow's has any, and
    vLLM's defaults stand for them."""
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod)
        for parameter, _ in module.named_parameters()
    }


@contextmanager
def _formats_of(module: Any, family: Family, formats: Sequence[Format | None]) -> Iterator[None]:
    """Inside, the module's routers and experts have the number of experts that their layer has, and its ranks."""

    def format_at(prefix: str) -> Format:
        format = formats[_layer_at(prefix)]
        assert format is not None, f"vLLM makes experts at {prefix}, where there are none"
        return format

    def router(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda width, experts, *rest, prefix, **more: make(width, format_at(prefix).experts, *rest, prefix=prefix, **more)

    def routed(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*, num_experts: int, top_k: int, prefix: str, **more: Any) -> Any:
            format = format_at(prefix)
            if (bias := more.get("e_score_correction_bias")) is not None:
                bias.data = bias.data[: format.experts].clone()
            if format.low_rank:
                more |= {"routed_experts_cls": LowRankExperts, "routed_experts_args": {"format": format, "gated": family.gated}}
            return make(num_experts=format.experts, top_k=family.experts_per_token(format.experts), prefix=prefix, **more)

        return made

    with _building:
        before = {ROUTER: getattr(module, ROUTER), EXPERTS: getattr(module, EXPERTS)}
        setattr(module, ROUTER, router(before[ROUTER]))
        setattr(module, EXPERTS, routed(before[EXPERTS]))
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(module, name, value)


def _layer_at(name: str) -> int:
    """The layer of a module or tensor with this name."""
    layer = re.search(r"layers\.(\d+)\.", name)
    assert layer is not None, f"{name} lies in no layer"
    return int(layer[1])
