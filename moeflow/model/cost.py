"""The cost of one token: parameters, operations and cache, counted from the model's config.json alone."""

from dataclasses import replace
from math import prod
from typing import Any

import torch

import moeflow  # noqa: F401  makes transformers know compressed checkpoints
from moeflow.arch import Config, Family
from moeflow.model.factors import expert_shapes, form_of, sizes_of
from moeflow.model.formats import layer_formats
from moeflow.model.skeleton import config_of, layers_of
from moeflow.model.spec import element_bytes
from moeflow.model.text_half import language_model


def active_parameters(config: Config) -> int:
    """The number of parameters that one token uses, embedding, head and routers included.

    As many of a layer's experts count as compute a token, at their mean size. All vectors of Compressed Experts count. The model is
    built without weights.
    """
    model = _without_weights(config)
    return sum(p.numel() for p in model.parameters()) + _not_computed(model, config)


def forward_flops(config: Config, length: int) -> int:
    """The floating-point operations of a forward pass over one sequence of `length` tokens.

    Two for each weight of each matrix that a token is multiplied with, and those of attention over all pairs of positions, masked
    or not. Norms, activations, the rotary embedding and softmax are left out. Counted so, Mixtral-8x7B takes 54.4 TFLOPs at 2,048
    tokens (He et al., arXiv 2406.02500, Table 3).
    """
    model = _without_weights(config)
    embedding = model.get_input_embeddings().weight
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1 and p is not embedding)
    if config.get("tie_word_embeddings"):
        matrices += model.get_input_embeddings().weight.numel()
    heads, keys, values = _heads(model.config, config)
    attention = 2 * length * length * heads * (keys + values) * Family.of(config).num_layers
    return 2 * length * (matrices + _not_computed(model, config)) + attention


def cache_bytes(config: Config) -> int:
    """The bytes of one token in the key-value cache of transformers, in the checkpoint's precision."""
    hf: Any = config_of(_plain(config))
    if config.get("kv_lora_rank"):  # what keys and values are computed from (DeepSeek-V2, arXiv 2405.04434, 2.1)
        width = hf.kv_lora_rank + hf.qk_rope_head_dim
    else:
        heads, keys, values = _heads(hf, config)
        width = int(getattr(hf, "num_key_value_heads", None) or heads) * (keys + values)
    return int(width) * Family.of(config).num_layers * element_bytes(config, "auto")


def _heads(hf: Any, config: Config) -> tuple[int, int, int]:
    """The number of attention heads of a layer, and the widths of a key and a value."""
    heads = int(hf.num_attention_heads)
    if config.get("kv_lora_rank"):  # multi-head latent attention
        return heads, int(hf.qk_nope_head_dim) + int(hf.qk_rope_head_dim), int(hf.v_head_dim)
    width = int(getattr(hf, "head_dim", None) or hf.hidden_size // heads)
    return heads, width, width


def _plain(config: Config) -> Config:
    return {k: v for k, v in config.items() if k != "quantization_config"}


def _without_weights(config: Config) -> Any:
    with torch.device("meta"):
        return language_model(config_of(_plain(config)))


def _not_computed(model: Any, config: Config) -> int:
    """How many of the experts' weights a token is multiplied with, minus how many there are in memory; mostly negative."""
    family, layers, more = Family.of(config), layers_of(model), 0
    for at, format in enumerate(layer_formats(config)):
        if format is not None and format.experts:
            experts = layers[at].get_submodule(family.arch.block).experts
            alone = replace(format, skip="", compressed="")
            shapes = expert_shapes(family, alone, at, *sizes_of(experts, form_of(experts)))
            matrices = sum(prod(shape) for shape in shapes.values())
            computed = min(family.main_experts, family.experts_per_token(format.experts))
            more += round(matrices * computed / format.experts)
            more -= sum(p.numel() for p in experts.parameters(recurse=False))  # as they are in memory, with padding
    return more
