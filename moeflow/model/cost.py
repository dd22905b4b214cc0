"""The cost of one token: parameters, operations and cache, counted from the model's config.json alone."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
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
    or not. Norms, activations, the rotary embedding, softmax, and the states of layers that have no attention (Mamba, linear
    attention) are left out. Counted so, Mixtral-8x7B takes 54.4 TFLOPs at 2,048 tokens (He et al., arXiv 2406.02500, Table 3).
    """
    model = _without_weights(config)
    embedding = model.get_input_embeddings().weight
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1 and p is not embedding)
    if config.get("tie_word_embeddings"):
        matrices += model.get_input_embeddings().weight.numel()
    attention = 2 * length * length * sum(a.heads for a in _attentions(model))
    return 2 * length * (matrices + _not_computed(model, config)) + attention


def cache_bytes(config: Config) -> int:
    """The bytes of one token in the key-value cache of transformers, in the checkpoint's precision.

    Layers that have a state of fixed size in the attention's place (Mamba, linear attention, convolutions) add nothing.
    """
    return cached(_without_weights(config)) * element_bytes(config, "auto")


def cached(model: Any) -> int:
    """How many numbers of one token a model of transformers keeps in its key-value cache."""
    return sum(a.cached for a in _attentions(model))


@dataclass(frozen=True)
class _Attention:
    """What one layer's attention has of a token: numbers in the cache, and in the keys and values of all heads together."""

    cached: int
    heads: int


def _attentions(model: Any) -> Iterator[_Attention]:
    """Those of all decoder layers; a layer of a hybrid may have none."""
    for layer in layers_of(model):
        for module in layer.modules():
            if _caches(type(module).forward):
                yield _attention(module, model.config)


@cache
def _caches(forward: Callable[..., Any]) -> bool:
    """Whether a module with this method keeps keys and values of every token, by the text of its code."""
    inside = inspect.unwrap(forward)
    return inside.__module__.startswith("transformers.models.") and re.search(r"\.update\(", inspect.getsource(inside)) is not None


def _attention(module: Any, hf: Any) -> _Attention:
    inside = dict(module.named_children())  # without those that a configuration leaves out, which are None
    if latent := inside.get("kv_a_proj_with_mqa"):  # keys and values are computed from a shorter vector (arXiv 2405.04434, 2.1)
        query = inside.get("q_b_proj") or inside["q_proj"]
        indexed = inside["indexer"].wk.out_features if "indexer" in inside else 0
        return _Attention(latent.out_features + indexed, query.out_features + inside["o_proj"].in_features)
    if "k_proj" in inside and "v_proj" in inside:
        keys, values, groups = inside["k_proj"].out_features, inside["v_proj"].out_features, module.num_key_value_groups
        return _Attention(keys + values, groups * (keys + values))
    width = int(getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
    each = int(getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads)
    return _Attention(2 * width * each, 2 * width * int(hf.num_attention_heads))


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
