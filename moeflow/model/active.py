"""How many parameters compute one token, counted from a configuration alone."""

from dataclasses import replace
from math import prod

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moeflow  # noqa: F401  makes transformers know compressed checkpoints
from moeflow.arch import Config, arch_of
from moeflow.model.factors import expert_shapes
from moeflow.model.formats import layer_formats


def active_parameters(config: Config) -> int:
    """The parameters that one token goes through in the model of this config.json, embedding, head and routers included.

    Of a layer's experts as many count as a token is computed by, at their mean size; the vectors of Compressed Experts count all.
    The model is built without weights.
    """
    arch = arch_of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    active = sum(p.numel() for p in model.parameters())
    for at, format in enumerate(layer_formats(config)):
        if format is not None and format.experts:
            experts = model.model.layers[at].get_submodule(arch.block).experts
            shapes = expert_shapes(arch, replace(format, skip="", compressed=""), at, experts.hidden_dim, experts.intermediate_dim)
            matrices = sum(prod(shape) for shape in shapes.values())
            computed = min(arch.computed(config), arch.reach(config, format.experts))
            active += round(matrices * computed / format.experts)
            active -= sum(p.numel() for p in experts.parameters(recurse=False))  # as they are in memory, with padding
    return active
