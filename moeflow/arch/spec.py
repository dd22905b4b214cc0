"""The data that describes a family of checkpoints: the names of its tensors, and how its router chooses. No torch."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

Config = dict[str, Any]  # a config.json

EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
"""The keys of config.json for the number of routed experts. transformers 5 writes other keys than the hub had."""

COMPRESSED = "moeflow_"
"""The beginning of the model_type of a compressed checkpoint, one whose layers differ or that its family's own classes cannot
compute. The family's model_type follows."""

LAYERS = "moeflow_layers"
"""The key of a compressed checkpoint's config.json for the formats of its decoder layers."""

ARCH = "moeflow_arch"
"""The key of a configuration for the `Arch` that was found of its model, as `Arch.to_json` gives it."""

ALIASES = {"kimi_k2": "deepseek_v3"}
"""Model types that transformers does not know, and the one whose architecture they have. A result keeps its source's name."""

WITHOUT_EFFECT = (
    "transformers_version", "_name_or_path", "architectures", "use_cache", "auto_map", "torchscript", "quantization_config",
)  # fmt: skip
"""Keys of config.json that do not change what a layer computes. A new value must not make any step run again."""

MAIN = "moeflow_main_experts"
"""The key of config.json for how many of a token's experts are computed; Compressed Experts replace the others."""

MATRICES = ("gate", "up", "down")
"""The matrices of an expert, in the order in which `Family.expert` names them."""

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
"""The tensors outside the decoder layers, named alike in all families. There is no head if it is tied to the embedding."""


def family_config(config: Config) -> Config:
    """The configuration of the family's own class for the configuration of a compressed checkpoint; any other unchanged."""
    plain = {k: v for k, v in config.items() if k != LAYERS}
    return plain | {"model_type": str(config["model_type"]).removeprefix(COMPRESSED)}


def essential(config: Config) -> Config:
    """The part of the configuration that changes what the model computes, without what each layer's tensors tell by themselves."""
    return {k: v for k, v in family_config(config).items() if k not in WITHOUT_EFFECT}


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


RETIRED = ("looked_at",)
"""Fields of `Arch` that earlier releases wrote into the config.json of their results."""


@dataclass(frozen=True, kw_only=True)
class Arch:
    """What looking at a model type finds (`moeflow.model.structure`). The names of tensors on disk are templates over {layer} and
    {expert}.

    The names of modules are needed only to run a decoder layer of transformers, which fuses the experts in memory.
    """

    model_type: str
    router: str  # [E, D]: one row per expert
    router_bias: str | None = None  # [E], or [1, E]: added for the choice only
    router_offset: str | None = None  # [E]: added to the logits, a bias of the router's linear map
    experts: tuple[str, ...]  # gate [F, D], up [F, D] and down [D, F] of an expert; up and down if it has no gate
    expert_biases: tuple[str, ...] = ()  # of the same matrices in the same order: [F], [F], [D]
    activation: str = ""  # a row of `moeflow.model.moe.ACTIVATIONS`; empty: what config.json calls hidden_act
    shared: tuple[str, ...] = ()  # the same of the expert that sees every token
    shared_gate: str | None = None  # [1, D]: its output times the sigmoid of this
    score: Literal["softmax", "sigmoid", "sparsemixer", "sqrtsoftplus"] = "softmax"
    weighs_input: bool = False  # an expert's input is multiplied with its routing weight, not its output
    normalize: Literal["always", "never", "norm_topk_prob"] = "norm_topk_prob"
    groups: bool = False  # n_group and topk_group limit the choice
    group_score: Literal["max", "top2"] = "max"
    scale_key: str = ""  # the key of config.json for what all routing weights are multiplied with
    router_fp32: bool = False  # router logits are computed in fp32, whatever the model's precision
    memory: tuple[tuple[str, str], ...] = ()  # (on disk, in memory): beginnings of names inside a decoder layer that differ
    turned: bool = False  # the stacks of experts in memory hold [E, inputs, outputs]
    block: str = "mlp"  # the module of the MoE block, or of a dense MLP, inside a decoder layer in memory
    block_router: str = "gate"  # the module of the router inside that block in memory
    norm: str = "post_attention_layernorm"  # the norm before the MoE block inside a decoder layer, on disk and in memory
    norm_feeds_more: bool = False  # that norm's output also goes elsewhere than into the MoE block, which may go but not the norm
    attention: str = "self_attn"  # the attention inside a decoder layer, on disk and in memory
    experts_key: str = ""  # the key of config.json for the number of routed experts; empty: one of `EXPERT_COUNT_KEYS`
    top_k_key: str = "num_experts_per_tok"
    moe: tuple[int, ...] | None = (
        None  # the layers that have experts; None: what config.json says in the keys of `Family.moe_layers`
    )
    expert_width: int | None = None  # F; None: what config.json says
    rest: tuple[tuple[str, str], ...] = ()  # (on disk, in memory): beginnings of names that differ, those of all layers among them
    handed_on: str = ""  # the key of config.json for how many numbers of 4 bytes a layer hands on to the next for each token

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        return {f.name: _plain(v) for f in fields(self) if (v := getattr(self, f.name)) != f.default or f.default is MISSING}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Arch":
        """The same from `to_json`, of this release or an earlier one. Raises TypeError for a field that is not known."""
        return Arch(**{name: _frozen(v) for name, v in value.items() if name not in RETIRED})


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
