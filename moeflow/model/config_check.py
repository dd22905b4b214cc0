"""The entries of config.json, checked before they are used: types, bounds, and how they fit each other. No torch."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moeflow.arch import LAYERS, MAIN, Config, Family
from moeflow.arch.family import LISTS
from moeflow.arch.spec import EXPERT_COUNT_KEYS
from moeflow.model.formats import layer_formats
from moeflow.model.json_file import kind_of
from moeflow.model.spec import PRECISIONS

MANY = 10_000  # layers of a model, or experts of a layer, at most
LARGE = 1 << 31

NEEDED = ("num_hidden_layers", "num_experts_per_tok", "hidden_size", "vocab_size")
COUNTS = {
    "num_hidden_layers": (1, MANY), "hidden_size": (1, LARGE), "vocab_size": (1, LARGE), "num_experts_per_tok": (1, MANY),
    **dict.fromkeys(EXPERT_COUNT_KEYS, (1, MANY)), MAIN: (1, MANY),
    "intermediate_size": (1, LARGE), "moe_intermediate_size": (1, LARGE), "shared_expert_intermediate_size": (1, LARGE),
    "n_shared_experts": (1, MANY), "num_attention_heads": (1, LARGE), "num_key_value_heads": (1, LARGE), "head_dim": (1, LARGE),
    "kv_lora_rank": (1, LARGE), "q_lora_rank": (1, LARGE), "qk_nope_head_dim": (1, LARGE), "qk_rope_head_dim": (1, LARGE),
    "v_head_dim": (1, LARGE), "decoder_sparse_step": (1, MANY), "first_k_dense_replace": (0, MANY), "n_group": (1, MANY),
    "topk_group": (1, MANY), "num_nextn_predict_layers": (0, MANY), "max_position_embeddings": (1, LARGE),
    "sliding_window": (0, LARGE), "max_window_layers": (0, MANY),
}  # fmt: skip
"""The whole numbers that are used, each with the smallest and the largest that is possible."""
COUNTED = re.compile(
    r"(moe_|n_|num_)+((local|routed|shared)_)*experts|(num_)?experts_per_tok(en)?|num_experts_per_tok(en)?|num_selected_experts"
    r"|moe_(top_?)?k|top_k_experts|num_hidden_layers|num_layers|n_layers?"
)
"""The keys by which model types call how many experts, experts of a token and layers they have, wherever they stand."""
TEXTS, BESIDE = ("text_config", "thinker_config"), ("vision_config", "audio_config")
"""The keys for a multimodal model's text model, and for what lies beside it."""
HALF = "half of a multimodal model is missing, fetch the checkpoint again"
NUMBERS = ("rms_norm_eps", "routed_scaling_factor", "router_jitter_noise", "rope_theta", "initializer_range", "attention_dropout")
TRUTHS = ("norm_topk_prob", "tie_word_embeddings", "attention_bias", "qkv_bias", "lm_head_bias", "use_sliding_window")
WORDS = ("hidden_act", "topk_method", "scoring_func", "dtype", "torch_dtype")
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu", "relu2")  # those that `moeflow.model.moe` computes
OBJECTS = ("quantization_config", "rope_scaling", "rope_parameters")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_counts(config: Mapping[str, Any], where: str, inside: str = "") -> None:
    """Raise ValueError if a count of experts, of experts of a token or of layers cannot be one, whatever the model type calls it.

    Those of a text model inside the configuration, or of another part of it, are checked, too. A list has one for each layer.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            check_counts(value, where, f"{inside}{name}.")
            continue
        counts = (value if isinstance(value, list) else [value]) if value is not None and COUNTED.fullmatch(name) else []
        if odd := [one for one in counts if type(one) is not int or not 0 <= one <= MANY]:
            wanted = f"a whole number from 0 to {MANY:,}"
            raise ValueError(f"{where}: {inside}{name} is {kind_of(odd[0])}, not {wanted}; correct it, or fetch it again")


def check_half(config: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for the config.json of a multimodal model that says nothing of its text model."""
    parts = (config, *(value for value in config.values() if isinstance(value, Mapping)))
    if any("expert" in name for part in parts for name in part):
        return
    for key in (key for key in TEXTS if key in config and not isinstance(config[key], Mapping)):
        raise ValueError(f"{where}: {key} is {kind_of(config[key])} where a text model should be; {HALF}")
    for key in (key for key in BESIDE if key in config and not {*TEXTS} & {*config}):
        raise ValueError(f"{where} has a {key} and no {TEXTS[0]}, which should describe its text model; {HALF}")


def check_config(config: Config, where: str) -> None:
    """Raise ValueError if an entry has the wrong type or an impossible value, or contradicts another; `where` names the file."""
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{where}: model_type is {kind_of(config.get('model_type'))}, not a word like 'mixtral'; fetch it again")
    family = Family.of(config)
    _check_there(config, [family.arch.top_k_key if k == "num_experts_per_tok" else k for k in NEEDED], where)
    if all(config.get(k) is None for k in ("moe_intermediate_size", "intermediate_size")):
        raise ValueError(f"{where} lacks moe_intermediate_size or intermediate_size, the size of an expert; fetch it again")
    check_entries(config, where, (family.arch.experts_key, family.arch.top_k_key))
    if beyond := [i for i in config.get("mlp_only_layers") or () if i >= family.num_layers]:
        raise ValueError(
            f"{where}: mlp_only_layers names layer {beyond[0]} of {family.num_layers} (num_hidden_layers); correct one"
        )
    _check_counts_agree(family, where)
    try:
        _check_router(family)
        _check_heads(family)
        layer_formats(config)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: {LAYERS} cannot be read ({type(error).__name__}: {error}); fetch it again") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_entries(config: Config, where: str, counted: Sequence[str] = ()) -> None:
    """Raise ValueError if an entry has the wrong type or an impossible value; `counted` are the keys of other positive counts."""
    _check_there(config, [k for k in NEEDED if k in config], where)  # and not null
    for name, value in config.items():
        if value is not None and (wanted := _wanted("num_experts_per_tok" if name in counted else name, value)):
            raise ValueError(f"{where}: {name} is {kind_of(value)}, not {wanted}; correct it, or fetch it again")
        if not _finite(value):
            raise ValueError(f"{where}: {name} holds NaN or Infinity, which JSON does not have; correct it, or fetch it again")


def _check_there(config: Config, needed: Sequence[str], where: str) -> None:
    if lacking := [k for k in needed if config.get(k) is None and not (k == "num_hidden_layers" and config.get(LISTS[0]))]:
        raise ValueError(f"{where} lacks {', '.join(lacking)}; fetch the checkpoint again")


def _wanted(name: str, value: Any) -> str:
    """What an entry of config.json should be, if its value is not that; empty if it is, and for what is not used."""
    if name in COUNTS:
        least, most = COUNTS[name]
        return "" if type(value) is int and least <= value <= most else f"a whole number from {least} to {most:,}"
    if name in NUMBERS:
        if name == "routed_scaling_factor" and value is False:  # as Hunyuan is published, which scales nothing
            return ""
        return "" if type(value) in (int, float) and math.isfinite(value) and value >= 0 else "a number from 0"
    if name in ("dtype", "torch_dtype") and isinstance(value, str):
        return "" if value in PRECISIONS else f"one of {', '.join(PRECISIONS)}"
    if name == "hidden_act" and isinstance(value, str):
        return "" if value in ACTIVATIONS else f"one of {', '.join(ACTIVATIONS)}"
    if name in TRUTHS:
        return "" if isinstance(value, bool) else "true or false"
    if name in WORDS:
        return "" if isinstance(value, str) else "a word"
    if name in OBJECTS:
        return "" if isinstance(value, Mapping) else "an object"
    if name in TOKENS:
        ids = value if isinstance(value, list) else [value]
        return "" if all(type(i) is int and -1 <= i < LARGE for i in ids) else "the number of a token"
    if name == "mlp_only_layers":
        fits = isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)
        return "" if fits else "a list of layers' numbers"
    if name == "architectures":
        return "" if isinstance(value, list) and all(isinstance(a, str) for a in value) else "a list of names"
    if name == LAYERS:
        return "" if isinstance(value, list) else "a list with an object for each layer"
    return ""


def _finite(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _check_counts_agree(family: Family, where: str) -> None:
    key = family.experts_key
    for other in (k for k in EXPERT_COUNT_KEYS if family.config.get(k) is not None):
        if family.config[other] != family.num_experts:
            raise ValueError(
                f"{where}: {key} is {family.num_experts} and {other} is {family.config[other]}, which both say how many experts a "
                "layer has; correct one of them"
            )


def _check_router(family: Family) -> None:
    experts, top_k, (groups, chosen) = family.num_experts, family.top_k, family.group_limit
    if top_k > experts:
        key = family.arch.top_k_key
        raise ValueError(f"{key}={top_k} is more than {family.experts_key}={experts}; correct one of them")
    if experts % groups or chosen > groups or experts // groups * chosen < top_k:
        raise ValueError(
            f"n_group={groups} and topk_group={chosen} do not divide {experts} experts so that a token reaches its {top_k} "
            "(num_experts_per_tok); correct one of them"
        )
    if not family.moe_layers:
        raise ValueError("no layer has experts (first_k_dense_replace, mlp_only_layers, decoder_sparse_step); correct them")


def _check_heads(family: Family) -> None:
    if family.config.get("kv_lora_rank") is not None:  # latent attention
        return
    width, heads, groups = (family.size(n) for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if heads and groups and heads % groups:
        raise ValueError(f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}; correct one of them")
    if heads and width and family.size("head_dim") is None and width % heads:
        raise ValueError(f"hidden_size={width} is no multiple of num_attention_heads={heads}; correct one of them")
