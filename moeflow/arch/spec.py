"""The data that describes a family of checkpoints: the names of its tensors, and how its router chooses. No torch."""

import re
from dataclasses import dataclass
from typing import Any, Literal

Config = dict[str, Any]  # a config.json

EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
"""The keys of config.json for the number of routed experts. transformers 5 writes other keys than the hub had."""

COMPRESSED = "moeflow_"
"""The beginning of the model_type of a compressed checkpoint, one whose layers differ or that its family's own classes cannot
compute. The family's model_type follows."""

LAYERS = "moeflow_layers"
"""The key of a compressed checkpoint's config.json for the formats of its decoder layers."""

MAIN = "moeflow_main_experts"
"""The key of config.json for how many of a token's experts are computed; Compressed Experts replace the others."""

MATRICES = ("gate", "up", "down")
"""The matrices of an expert, in the order in which `Family.expert` names them."""

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
"""The tensors outside the decoder layers, named alike in all families. There is no head if it is tied to the embedding."""


_IN_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\..+")


def layer_of(name: str) -> int | None:
    """The number of the decoder layer that a tensor belongs to, by its name; None for embedding, final norm and head.

    Raises ValueError for a name that begins like one of a layer and has no number.
    """
    if not name.startswith("model.layers."):
        return None
    if (match := _IN_LAYER.fullmatch(name)) is None:
        raise ValueError(f"a tensor is named {name!r}, which tells no layer; it should begin with model.layers.NUMBER.")
    return int(match[1])


def is_number(word: str) -> bool:
    """Whether a part of a tensor's name is the number of an expert: "7", not "07" and no digits of other scripts."""
    return word.isascii() and word.isdigit() and (word == "0" or word[0] != "0") and len(word) <= 6


@dataclass(frozen=True, kw_only=True)
class Arch:
    """The names of tensors on disk are templates over {layer} and {expert}.

    The names of modules are needed only to run a decoder layer of transformers, which fuses the experts in memory.
    """

    model_type: str
    router: str  # [E, D]: one row per expert
    router_bias: str | None = None  # [E]: added for the choice only
    experts: tuple[str, ...]  # gate [F, D], up [F, D] and down [D, F] of an expert
    shared: tuple[str, ...] = ()  # the same of the expert that sees every token
    shared_gate: str | None = None  # [1, D]: its output times the sigmoid of this
    score: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    normalize: Literal["always", "never", "norm_topk_prob"] = "norm_topk_prob"
    groups: bool = False  # n_group and topk_group limit the choice
    group_score: Literal["max", "top2"] = "max"
    router_fp32: bool = False  # router logits are computed in fp32, whatever the model's precision
    drop_score: str = "router_score"  # by which the authors of Expert Drop rank experts: a row of `DROP_SCORES`
    memory: tuple[tuple[str, str], ...] = ()  # (on disk, in memory): beginnings of names inside a decoder layer that differ
    block: str = "mlp"  # the module of the MoE block, or of a dense MLP, inside a decoder layer in memory
    block_router: str = "gate"  # the module of the router inside that block in memory
    norm: str = "post_attention_layernorm"  # the norm before the MoE block inside a decoder layer, on disk and in memory
    attention: str = "self_attn"  # the attention inside a decoder layer, on disk and in memory
    latent: bool = False  # multi-head latent attention: keys and values are computed from a shorter vector
    biases: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # the matrices of the attention that may have a bias
    biased: tuple[str, bool] = ("attention_bias", False)  # the key of config.json that says whether they do, and its default
    qk_norm: Literal["", "head", "all"] = ""  # queries and keys are normed: not, each head for itself, all heads together
    norm_bias: bool = False  # the norms have a bias
