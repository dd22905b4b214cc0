"""How many parameters compute one token, counted from a configuration alone."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moeflow.arch import Config, arch_of
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
    for layer, format in zip(model.model.layers, layer_formats(config), strict=True):
        if format is not None:
            experts = layer.get_submodule(arch.block).experts
            matrices = sum(p.numel() for p in experts.parameters(recurse=False))
            active -= round(matrices * (1 - arch.computed(config) / format.experts))
    return active
