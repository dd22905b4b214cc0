"""Which of two ways vLLM runs a checkpoint, and why. No torch and no vLLM.

The general way is vLLM's Transformers backend around moeflow's own classes, for every form. The native way is vLLM's own class of
the family, with each layer's own number of experts, so that its fused kernels, CUDA graphs and torch.compile stay; low-rank experts
stand in it as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moeflow.arch import COMPRESSED, Config, Family
from moeflow.model.formats import CLASSES, Format, layer_formats

Way = Literal["general", "native"]

WAY = "moeflow_way"
"""The key of config.json, or of vLLM's --hf-overrides, that asks for a way; "auto" or absent: native where it can be."""

QUANTIZED = "quantization_config"

WAYS = ("auto", "general", "native")

NAMES = {
    "mixtral": ("MixtralForCausalLM",),
    "qwen2_moe": ("Qwen2MoeForCausalLM",),
    "qwen3_moe": ("Qwen3MoeForCausalLM",),
    "olmoe": ("OlmoeForCausalLM",),
    "phimoe": ("PhimoeForCausalLM", "PhiMoEForCausalLM"),
    "deepseek_v2": ("DeepseekV2ForCausalLM",),
    "deepseek_v3": ("DeepseekV3ForCausalLM",),
}
"""The architectures that the config.json of a family may name; published Phi-3.5-MoE spells its own in the second way."""

JITTER = 0.01
"""How near to the best a second expert must be to be weighed against it: what vLLM's class of Phi-3.5-MoE has for any model."""


@dataclass(frozen=True)
class Chosen:
    """The way of a checkpoint, and why it is this one."""

    way: Way
    why: str


def architectures() -> dict[str, str]:
    """The architecture names of compressed checkpoints, and the model type of each."""
    return {CLASSES + name: COMPRESSED + model_type for model_type, names in NAMES.items() for name in names}


def way_of(config: Config, no_kernel: str = "") -> Chosen:
    """The way of the checkpoint with this config.json. Raises ValueError if it asks for one that cannot be.

    `no_kernel`: why the engine cannot compute with its packed experts.
    """
    asked, against = str(config.get(WAY) or "auto"), against_native(config) or no_kernel
    if asked not in WAYS:
        raise ValueError(f"{WAY}={asked!r} in the configuration is no way to run it; write one of {', '.join(WAYS)}")
    if asked == "general":
        return Chosen("general", f"the configuration asks for it ({WAY})")
    if against:
        if asked == "native":
            raise ValueError(f"{WAY}='native' cannot be: {against}; leave {WAY} out, and the checkpoint runs the general way")
        return Chosen("general", against)
    if config.get(QUANTIZED):
        return Chosen("native", "its packed experts differ only in their number, and vLLM has a kernel for them")
    if low_rank(config):
        return Chosen("native", "its experts are whole or low-rank, and nothing else of it is new to vLLM's class")
    return Chosen("native", "its layers differ only in their number of whole experts")


def low_rank(config: Config) -> bool:
    """Whether a layer has low-rank experts."""
    return any(format is not None and format.low_rank for format in layer_formats(config))


def against_native(config: Config) -> str:
    """Why vLLM's own class of the family would compute something else; empty if it would not."""
    if config.get(QUANTIZED) and packed_alike(config) is None:
        return "its packed experts are low-rank, or not of the same bits and groups in all layers; they are unpacked while loaded"
    for layer, format in enumerate(layer_formats(config)):
        if format is not None and (why := _new_to_vllm(format)):
            return f"layer {layer} {why}"
    family = Family.of(config)
    return _OTHERWISE[family.arch.model_type](config) if family.arch.model_type in _OTHERWISE else "vLLM's own class is not known"


def packed_alike(config: Config) -> dict[str, Any] | None:
    """How weights are packed (`weights` of the quantization_config's one group), where every layer's experts are whole, and packed
    alike; None otherwise, and where nothing is packed."""
    groups = list(((config.get(QUANTIZED) or {}).get("config_groups") or {}).values())
    return dict(groups[0]["weights"]) if len(groups) == 1 and not low_rank(config) else None


def _new_to_vllm(format: Format) -> str:
    return next(
        (
            why
            for holds, why in (
                (format.gone, "has lost its experts"),
                (format.compressed, "has Compressed Experts"),
                (format.skip, "skips experts"),
                (format.added, "has low-rank additions to its packed experts, which are unpacked while loaded"),
            )
            if holds
        ),
        "",
    )


def _silu(config: Config) -> str:
    act = config.get("hidden_act", "silu")
    return "" if act == "silu" else f"its experts' activation is {act}, and vLLM's class has silu"


def _unless(key: str, fits: bool, default: bool) -> Callable[[Config], str]:
    """Against the native way unless this key of config.json, by default `default`, is as vLLM's class takes for granted."""

    def check(config: Config) -> str:
        value = bool(config.get(key, default))
        return _silu(config) or ("" if value == fits else f"{key} is {value}, which vLLM's class takes to be {fits}")

    return check


def _phimoe(config: Config) -> str:
    if absent := [key for key in ("attention_bias", "lm_head_bias") if not config.get(key)]:
        return f"{absent[0]} is not true, and vLLM's class has these biases in any case"
    noise = config.get("router_jitter_noise", JITTER)
    return _silu(config) or ("" if noise == JITTER else f"router_jitter_noise is {noise}, which vLLM's class takes to be {JITTER}")


def _deepseek(config: Config) -> str:
    family = Family.of(config)
    if not config.get("rope_interleave", True):
        return "rope_interleave is False, which vLLM's class takes to be True"
    if family.arch.model_type == "deepseek_v2" and config.get("norm_topk_prob"):
        return "norm_topk_prob is True, which a DeepSeek-V2 of transformers leaves aside and vLLM's class does not"
    if config.get("topk_method") == "greedy" and int(config.get("n_group") or 1) > 1:
        return "topk_method is greedy, and vLLM's class would choose by groups"
    return _silu(config)


_OTHERWISE: Mapping[str, Callable[[Config], str]] = {
    "mixtral": _silu,
    "qwen2_moe": _silu,
    "qwen3_moe": _silu,
    "olmoe": _unless("norm_topk_prob", False, False),
    "phimoe": _phimoe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
}
"""For each family, what vLLM's class would compute otherwise than transformers with this config.json."""
