"""A family that was found is believed only if what moeflow computes with it is what transformers computes.

Shapes are suffixes: N sequences, L positions, D model width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moeflow.arch import ARCH, Arch, Config, Family
from moeflow.model.checkpoint import read_moe
from moeflow.model.layout import kept
from moeflow.model.stream import HIDDEN, Stream
from moeflow.model.structure.anatomy import Anatomy, Unknown, ids, is_experts, language
from moeflow.model.structure.routing import CLOSE


def prove(arch: Arch, config: Config, tensors: Mapping[str, Tensor], model: Any, anatomy: Anatomy) -> dict[str, float]:
    """Compare the streamed model, our MoE output and a pruned layer with the tiny model. Raises Unknown for what differs."""
    bound = config | {ARCH: arch.to_json()}
    far = {"streamed": _streamed(bound, tensors, model, anatomy), "pruned": _pruned(bound, tensors, anatomy)}
    if far["streamed"]:
        raise Unknown(f"run layer by layer it is {far['streamed']:.1e} off what transformers computes")
    return far


@torch.inference_mode()
def _streamed(config: Config, tensors: Mapping[str, Tensor], model: Any, anatomy: Anatomy) -> float:
    """The largest difference of hidden states behind the last layer, and of logits."""
    stream = Stream(config)
    tokens = ids(int(config["vocab_size"]))
    for module in model.modules():
        if is_experts(module) and hasattr(module, "config"):
            module.config._experts_implementation = stream.experts
    want = language(model)(tokens, use_cache=False).logits
    states = {HIDDEN: stream.embed(tensors, tokens)}
    for layer in range(stream.family.num_layers):
        prefix = stream.family.prefix(layer)
        module = stream.layer({n: t for n, t in tensors.items() if n.startswith(prefix)}, layer)
        states = stream.run(module, layer, states)
    logits = stream.logits(tensors)(states[HIDDEN])
    return float((logits - want).abs().max())


@torch.inference_mode()
def _pruned(config: Config, tensors: Mapping[str, Tensor], anatomy: Anatomy) -> float:
    """How far a layer whose experts are sliced is off the whole layer with the others forbidden."""
    family = Family.of(config)
    layer, count = anatomy.moe[-1], family.num_experts
    groups, _ = family.group_limit
    each = count // groups
    stay = [e for e in range(count) if e % each or count - groups not in family.legal_counts(count)]  # none of a group's first
    keep = len(stay)
    names = kept([n for n in tensors if n.startswith(family.prefix(layer))], config, layer, stay)
    cut = {}
    for old, (new, sliced) in names.items():
        tensor = tensors[old]
        cut[new] = tensor if not sliced else tensor[stay] if tensor.shape[0] == count else tensor[..., stay]
    x_TD = torch.randn(96, int(config["hidden_size"]), generator=torch.Generator().manual_seed(7))
    allowed_E = torch.tensor([e in stay for e in range(count)])
    want, have = read_moe(tensors, config, layer)(x_TD, allowed_E), read_moe(cut, family.with_experts(keep), layer)(x_TD)
    far = float((want - have).abs().max())
    if far > CLOSE * max(1.0, float(want.abs().max())):
        raise Unknown(f"a layer with {keep} of its {count} experts is {far:.1e} off the whole one with the others forbidden")
    return far
