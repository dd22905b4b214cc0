"""What an engine's own class of a family computes otherwise than transformers does, by a config.json. Standard library only.

Of llama.cpp, read in its `src/models/` and `conversion/` as llama-cpp-python 0.3.36 has them; `make test-gguf` compares what is let
through.
"""

from collections.abc import Callable, Mapping
from typing import Any

Config = Mapping[str, Any]


BIASED = ("attention_bias", "lm_head_bias")
"""What other classes for Phi than transformers' take as given."""


def in_engines(config: Config) -> tuple[tuple[str, str], ...]:
    """The engines whose classes compute something else than transformers with this config.json, each with what that is."""
    named = config if _model_type(config) == "phimoe" else {}
    lacks = " and no ".join(name for name in BIASED if named and not named.get(name))
    found = {"llama.cpp": in_llama_cpp(config)}
    if lacks:
        found |= dict.fromkeys(("vllm", "vllm-moeflow", "sglang"), f"this one has no {lacks}, which it takes as given")
    return tuple((engine, why) for engine, why in found.items() if why)


def _model_type(config: Config) -> str:
    return str(config.get("model_type", "")).removeprefix("moeflow_")


def in_llama_cpp(config: Config) -> str:
    """Why llama.cpp would write something else than transformers with this config.json; "" if it would not, and for families of
    which that is not known."""
    checks = _CHECKS.get(_model_type(config), ())
    return next((why for check in checks if (why := check(config))), "")


def _silu(config: Config) -> str:
    act = config.get("hidden_act", "silu")
    return "" if act == "silu" else f"hidden_act is {act}, and its experts have silu"


def _sees_all(slides: bool) -> Callable[[Config], str]:
    """Against a window of attention shorter than the context. `slides`: whether there is one where config.json does not say."""

    def check(config: Config) -> str:
        window = config.get("sliding_window") if config.get("use_sliding_window", slides) else None
        short = window and window < int(config.get("max_position_embeddings") or window + 1)
        return f"sliding_window is {window}, and its attention sees all tokens" if short else ""

    return check


def _sums_to_one(is_so: bool) -> Callable[[Config], str]:
    def check(config: Config) -> str:
        value = bool(config.get("norm_topk_prob", False))
        return "" if value == is_so else f"norm_topk_prob is {value}, which it takes to be {is_so}"

    return check


def _experts_everywhere(config: Config) -> str:
    if dense := config.get("mlp_only_layers"):
        return f"mlp_only_layers is {list(dense)}, and it has experts in every layer"
    step = config.get("decoder_sparse_step", 1)
    return "" if step == 1 else f"decoder_sparse_step is {step}, and it has experts in every layer"


def _olmoe(config: Config) -> str:
    if config.get("clip_qkv") is not None:
        return f"clip_qkv is {config['clip_qkv']}, and it clips nothing"
    if (epsilon := config.get("rms_norm_eps", 1e-5)) != 1e-5:
        return f"rms_norm_eps is {epsilon}, which it takes to be 1e-05"
    heads = [config.get(key) for key in ("num_attention_heads", "num_key_value_heads")]
    return "" if heads[1] in (None, heads[0]) else f"num_key_value_heads is {heads[1]}, which it takes to be {heads[0]}"


def _groups_by_best(config: Config) -> str:
    groups = int(config.get("n_group") or 1)
    return "" if groups == 1 else f"n_group is {groups}, and it ranks groups by their two best experts, where this family has one"


def _interleaved(config: Config) -> str:
    return "" if config.get("rope_interleave", True) else "rope_interleave is False, which it takes to be True"


def _sparsemixer(config: Config) -> str:
    return "its router weighs two experts by softmax, and this family's by sparsemixer"


_CHECKS: Mapping[str, tuple[Callable[[Config], str], ...]] = {
    "mixtral": (_silu, _sees_all(True)),
    "qwen2_moe": (_silu, _sums_to_one(False), _experts_everywhere, _sees_all(False)),
    "qwen3_moe": (_silu, _sums_to_one(True), _experts_everywhere, _sees_all(False)),
    "olmoe": (_silu, _sums_to_one(False), _olmoe),
    "phimoe": (_sparsemixer,),
    "deepseek_v2": (_silu, _sums_to_one(False), _groups_by_best),
    "deepseek_v3": (_silu, _interleaved),
}
"""For each family that was compared, what its config.json must say."""
