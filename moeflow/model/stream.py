"""Run a model of transformers one decoder layer at a time: a layer's weights are in memory only while it runs.

The layers are transformers' own modules, filled from the hub's files. They compute the same as the whole model, bit for bit. If a
layer is no longer its family's standard, its fused experts are `RoutedExperts`.
Shapes are suffixes: N sequences, L positions, D model width, V vocabulary.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from moeflow.arch import Config, Family, family_config
from moeflow.model.checkpoint import Tensors
from moeflow.model.factors import fused
from moeflow.model.formats import Format, check_tensors, format_of
from moeflow.model.routed_experts import experts_of
from moeflow.model.skeleton import Arguments, Skeleton, config_of, default_dtype
from moeflow.model.spec import precision
from moeflow.model.trimmed import take_out

EXPERTS = "grouped_mm"
"""The implementation of fused experts in transformers that is used everywhere, since implementations differ in the last bits."""

HIDDEN, CARRIED = "hidden_NLD", "carried_"
"""The name of the hidden states among what a layer takes and returns, and the beginning of the names of what else there is."""

States = dict[str, Tensor]


class Stream:
    """A model without weights, which makes its layers one at a time and knows the arguments that they are called with."""

    def __init__(self, config: Config, *, device: str = "cpu", dtype: str = "auto", experts: str = EXPERTS) -> None:
        self.config, self.device, self.experts = config, torch.device(device), experts
        self.family = Family.of(family_config(config))
        self.dtype: torch.dtype = getattr(torch, precision(config, dtype))
        self.skeleton = Skeleton(config_of(self.family.config), device=self.device, dtype=self.dtype)
        self._arguments: dict[tuple[int, int], list[Arguments]] = {}

    def embed(self, rest: Mapping[str, Tensor], ids_NL: Tensor) -> Tensor:
        """Hidden states before the first layer, [N, L, D]. `rest` has the tensors outside the decoder layers."""
        return self.skeleton.embed(self._around(rest, self.skeleton.before()), ids_NL.to(self.device))

    def logits(self, rest: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """The function from hidden states behind the last layer to logits [N, L, V]."""
        return partial(self.skeleton.logits, self._around(rest, self.skeleton.behind()))

    def layer(self, tensors: Mapping[str, Tensor], layer: int, *, experts: bool = True) -> nn.Module:
        """One decoder layer with its weights; without its `experts` it can be run up to its MoE block, and these are not read.

        Raises ValueError if a tensor is missing, left over or of the wrong shape.
        """
        info = tensors.info if isinstance(tensors, Tensors) else tensors
        format = format_of({n: tuple(info[n].shape) for n in info}, self.config, layer)
        config = self.family.with_experts(format.experts) if format.experts else self.family.config
        with torch.device("meta"), default_dtype(self.dtype):
            module = type(self.skeleton.layers[layer])(self._hf_config(config), layer).eval()
            if format.experts:
                block: Any = module.get_submodule(self.family.arch.block)
                block.experts = experts_of(block.experts, format, config) if experts else nn.Identity()
            if format.gone:
                take_out(module, self.family, format)
        values = self._in_memory(tensors, layer, format, module)
        if format.experts and experts:
            stacks = fused(tensors, self.family, format, layer, block.experts, device=self.device, dtype=self.dtype)
            values |= {f"{self.family.arch.block}.experts.{n}": t for n, t in stacks.items()}
        filled(module, values, f"layer {layer}")
        self.skeleton.compute_buffers(module)
        return module

    def run(self, module: nn.Module, layer: int, states: States) -> States:
        """The states behind this decoder layer, made by `layer`, for those before it.

        States are the hidden states "hidden_NLD", and "carried_1" and so on where a layer returns more for the next one to take.
        """
        hidden_NLD = states[HIDDEN]
        carried = {int(n.removeprefix(CARRIED)): t for n, t in states.items() if n != HIDDEN}
        arguments = self.arguments(layer, hidden_NLD).filled(layer, carried)
        out = module(hidden_NLD, *arguments.positional, **arguments.named)
        hidden_NLD, *more = out if isinstance(out, tuple) else (out,)
        more = more[: self.skeleton.outputs - 1]
        return {HIDDEN: hidden_NLD} | {f"{CARRIED}{at}": t for at, t in enumerate(more, 1) if isinstance(t, Tensor)}

    def arguments(self, layer: int, hidden_NLD: Tensor) -> Arguments:
        """The arguments of this layer beside the hidden states: mask, positions, rotary embedding."""
        n, length = hidden_NLD.shape[:2]
        if (n, length) not in self._arguments:
            self._arguments = {(n, length): self.skeleton.arguments(hidden_NLD)}
        return self._arguments[n, length][layer]

    def _around(self, rest: Mapping[str, Tensor], asked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors outside the decoder layers by their names in memory. Raises ValueError for one that is missing or misshapen."""
        here = {self.family.rest_in_memory(n): n for n in rest}
        sources = {n: n if n in here else self.skeleton.tied(n) for n in asked}
        stored = {n: rest[here[s]] for n, s in sources.items() if s in here}
        check_tensors("the checkpoint", {n: t.shape for n, t in asked.items()}, {n: t.shape for n, t in stored.items()})
        return {n: t.to(self.device, self._dtype(n, asked[n])) for n, t in stored.items()}

    def _hf_config(self, config: Config) -> PretrainedConfig:
        hf = config_of(config)
        hf._attn_implementation, hf._experts_implementation = self.skeleton.attention, self.experts
        return hf

    def _in_memory(self, tensors: Mapping[str, Tensor], layer: int, format: Format, module: nn.Module) -> dict[str, Tensor]:
        """The layer's tensors without the experts, by their names inside the decoder layer in memory."""
        prefix = self.family.prefix(layer)
        asked = module.state_dict()

        def moved(name: str, inside: str) -> Tensor:
            tensor = tensors[name]
            bias = name == self.family.router_bias(layer)
            exact = (self.family.kind(name) == "fixed" and not bias) or not tensor.is_floating_point()
            tensor = tensor.to(self.device, tensor.dtype if exact else self._dtype(inside, asked.get(inside, tensor)))
            # [1, E] in some families' memory
            return tensor.view(asked[inside].shape) if bias and tensor.shape == asked[inside].shape[1:] else tensor

        inside = {n: self.family.in_memory(n.removeprefix(prefix)) for n in tensors if not self.family.of_expert(n, layer)}
        return {memory: moved(name, memory) for name, memory in inside.items()}

    def _dtype(self, name: str, asked: Tensor) -> torch.dtype:
        """The precision in which transformers would load this tensor: the model's own, unless its class says fp32."""
        kept: bool = any(re.search(pattern.replace("*", ".*"), name) for pattern in self.skeleton.plan)
        return torch.float32 if kept else asked.dtype if asked.is_floating_point() else self.dtype


def filled(module: nn.Module, values: Mapping[str, Tensor], what: str) -> nn.Module:
    """The module, made on the meta device, with these tensors. Raises ValueError if they are not exactly those it has."""
    asked, stored = ({n: t.shape for n, t in tensors.items()} for tensors in (module.state_dict(), values))
    check_tensors(what, asked, stored)
    module.load_state_dict(dict(values), assign=True)
    return module.requires_grad_(False)
