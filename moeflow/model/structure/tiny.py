"""The configuration of a tiny model of the same type: smaller sizes, fewer layers, all else as it is."""

from collections.abc import Mapping
from typing import Any

from moeflow.arch import Config
from moeflow.arch.by_layer import CHOSEN
from moeflow.arch.by_layer import EXPERTS as COUNTS

EXPERTS, TOP_K, LAYERS = 8, 3, 8

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "max_position_embeddings": 128,
    "shared_expert_intermediate_size": 40, "moe_shared_expert_intermediate_size": 40, "shared_intermediate_size": 40,
    "shared_experts_intermediate_size": 40, "share_expert_dim": 40, "moe_latent_size": 16,
    "intermediate_size_mlp": 44, "dense_intermediate_size": 44, "expert_ffn_hidden_size": 24, "ffn_hidden_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 24,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16, "attention_head_dim": 8, "mtp_num_layers": 0,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_num_heads": 8, "mamba_n_heads": 8, "mamba_head_dim": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "n_groups": 1,
    "ssm_state_size": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "chunk_size": 8, "mamba_dt_rank": 4,
    "index_n_heads": 4, "index_head_dim": 16, "index_topk": 8, "index_kpool": 4, "text_hidden_size": 32, "sliding_window": 8,
    "depth": 2, "num_heads": 4, "out_hidden_size": 32, "swa_head_dim": 16, "swa_v_head_dim": 8, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "o_lora_rank": 8, "kv_channels": 8, "num_hash_layers": 1, "num_sliding_attention_heads": 4,
    "d_model": 32, "encoder_layers": 2, "encoder_ffn_dim": 48, "encoder_attention_heads": 4, "output_dim": 32,
    "downsample_hidden_size": 8, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8,
}  # fmt: skip
"""Sizes by the names that config.json has for them."""
OF_HEADS = (
    "head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "attention_head_dim", "swa_head_dim",
    "swa_v_head_dim",
)  # fmt: skip
GROUPS = ("n_group", "num_expert_group")
NUMBERS = ("_layers", "_idxs", "_layer_ids")  # endings of the names of lists of layers
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LEFT = ("model_type", "architectures", "transformers_version", "quantization_config", "torch_dtype", "dtype", "_name_or_path")


def tiny(config: Config, *, layers: int = LAYERS, heads: bool = True) -> Config:
    """A configuration with small sizes in the place of those that are given; nested configurations, too.

    Without `heads` the heads of attention keep their sizes, to which entries under names that are not known may have to fit.
    """
    small = {k: v for k, v in config.items() if k not in LEFT[2:]}
    count = config.get("num_hidden_layers")
    kept = _kept(config, count, layers) if type(count) is int else layers
    for key, value in config.items():
        if isinstance(value, Mapping):
            small[key] = _below(key, value, layers, kept, count, heads)
        elif key in OF_HEADS and not heads:
            continue
        elif key in SIZES and type(value) is int:
            small[key] = min(SIZES[key], value) if value else value
        elif key in COUNTS and type(value) is int:
            small[key] = EXPERTS
        elif key in CHOSEN:
            small[key] = _chosen(value)
        elif key in GROUPS and type(value) is int and value > 1:
            small[key] = 2
        elif key == "topk_group" and type(value) is int:
            small[key] = 1
        elif key in TOKENS:
            small[key] = TOKENS[key]
        elif key in ("first_k_dense_replace", "num_dense_layers", "first_dense_layers") and type(value) is int:
            small[key] = min(value, 1)
    return _fewer(small, config, count, kept)


def _chosen(value: Any) -> Any:
    """Experts of a token: one stays one, and none that is given stays so."""
    if isinstance(value, list):
        return [_chosen(v) for v in value]
    return min(value, TOP_K) if type(value) is int else value


def _below(key: str, value: Mapping[str, Any], layers: int, kept: int, count: Any, heads: bool) -> Any:
    """A nested entry: another configuration, or something by layer of the `count` that there are, of which so many are `kept`."""
    if any(k in value for k in ("hidden_size", "model_type", "num_hidden_layers", "depth")):
        return tiny(dict(value), layers=min(layers, 4) if key != "text_config" else layers, heads=heads)
    if type(count) is int and value and all(str(k).isdigit() and int(k) < count for k in value):
        return {k: v for k, v in value.items() if int(k) < kept}
    lists = {k: v for k, v in value.items() if _numbers_layers(k, v)}
    last = kept if any(count in v for v in lists.values()) else kept - 1  # they count from one, or from zero
    sizes = {k: min(SIZES[k], v) for k, v in value.items() if k in SIZES and type(v) is int and (heads or k not in OF_HEADS)}
    return {**value, **sizes, **{k: [n for n in v if n <= last] for k, v in lists.items()}}


def _numbers_layers(key: str, value: Any) -> bool:
    return isinstance(value, list) and key.endswith(NUMBERS) and all(type(v) is int for v in value)


def _fewer(small: Config, config: Config, count: Any, kept: int) -> Config:
    if type(count) is not int:
        return small
    small["num_hidden_layers"] = kept
    for key, value in small.items():
        by_layer = isinstance(value, list) or (isinstance(value, str) and key.endswith("_pattern"))
        if by_layer and len(value) == count and key != "architectures":
            small[key] = value[:kept]
        elif _numbers_layers(key, value):
            small[key] = [v for v in value if v < kept]
    latent, rotated, whole = (config.get(k) for k in ("qk_nope_head_dim", "qk_rope_head_dim", "head_dim"))
    if latent and rotated and whole == latent + rotated != rotated:  # of the two parts of a query, and not of the rotated one
        small["head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    if _by_sections(config):
        small["head_dim"] = config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"])
    if config.get("num_key_value_heads") is not None and config.get("num_key_value_heads") == config.get("num_attention_heads"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _kept(config: Config, count: int, layers: int) -> int:
    """How many of its layers a tiny model has: it ends with a layer of the same kind, where it can."""
    kinds, most = config.get("layer_types"), min(count, layers)
    if not isinstance(kinds, list) or len(kinds) != count:
        return most
    return next((n for n in range(most, most // 2, -1) if kinds[n - 1] == kinds[-1]), most)


def _by_sections(config: Config) -> bool:
    """Whether the rotary embedding has something for each of a head's dimensions, or sections of them: it fits that size only."""
    return any(key in v for v in config.values() if isinstance(v, Mapping) for key in ("mrope_section", "long_factor"))
