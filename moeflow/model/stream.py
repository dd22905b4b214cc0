"""Run a model of transformers one decoder layer at a time: a layer's weights are in memory only while it runs.

The layers are transformers' own modules, filled from the hub's files. They compute the same as the whole model, bit for bit. If a
layer is no longer its family's standard, its fused experts are `RoutedExperts`.
Shapes are suffixes: N sequences, L positions, D model width, V vocabulary.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from moeflow.arch import Config, Family, family_config
from moeflow.model.checkpoint import Tensors
from moeflow.model.factors import fused
from moeflow.model.formats import Format, check_tensors, format_of
from moeflow.model.routed_experts import experts_of
from moeflow.model.spec import precision
from moeflow.model.text_half import language_model
from moeflow.model.trimmed import take_out

EXPERTS = "grouped_mm"
"""The implementation of fused experts in transformers that is used everywhere, since implementations differ in the last bits."""


class Stream:
    """A model without weights, which makes its layers one at a time and knows the arguments that they are called with."""

    def __init__(self, config: Config, *, device: str = "cpu", dtype: str = "auto", experts: str = EXPERTS) -> None:
        self.config, self.device, self.experts = config, torch.device(device), experts
        self.family = Family.of(family_config(config))
        self.dtype: torch.dtype = getattr(torch, precision(config, dtype))
        hf = self._hf_config(self.family.config)
        with torch.device("meta"):
            self.skeleton = language_model(hf, attn_implementation="sdpa").eval()
        self._layer_class = type(self.skeleton.model.layers[0])
        self._norm, self.skeleton.model.norm = self.skeleton.model.norm, nn.Identity()
        self.skeleton.model.layers = nn.ModuleList(_Stub(layer) for layer in self.skeleton.model.layers)
        # the rotary embedding has no weights: its frequencies are computed
        self.skeleton.model.rotary_emb = type(self.skeleton.model.rotary_emb)(config=hf).to(self.device)
        self._arguments: dict[tuple[int, int], list[dict[str, Any]]] = {}

    def embed(self, rest: Mapping[str, Tensor], ids_NL: Tensor) -> Tensor:
        """Hidden states before the first layer, [N, L, D]."""
        table = self._below("model.embed_tokens", rest)
        return _filled(copy.deepcopy(self.skeleton.model.embed_tokens), table, "model.embed_tokens")(ids_NL.to(self.device))

    def layer(self, tensors: Mapping[str, Tensor], layer: int) -> nn.Module:
        """One decoder layer with its weights. Raises ValueError if a tensor is missing, left over or of the wrong shape."""
        info = tensors.info if isinstance(tensors, Tensors) else tensors
        format = format_of({n: tuple(info[n].shape) for n in info}, self.config, layer)
        config = self.family.with_experts(format.experts) if format.experts else self.family.config
        values = self._in_memory(tensors, layer, format)
        with torch.device("meta"):
            module = self._layer_class(self._hf_config(config), layer).eval()
            if format.experts:
                block: Any = module.get_submodule(self.family.arch.block)
                block.experts = experts_of(block.experts, format, config)
            if format.gone:
                take_out(module, self.family, format)
        if format.experts:
            d, f = block.experts.hidden_dim, block.experts.intermediate_dim
            experts = fused(tensors, self.family, format, layer, d, f, device=self.device, dtype=self.dtype)
            values |= {f"{self.family.arch.block}.experts.{n}": t for n, t in experts.items()}
        return _filled(module, values, f"layer {layer}")

    def arguments(self, layer: int, hidden_NLD: Tensor) -> dict[str, Any]:
        """The arguments of this layer beside the hidden states: mask, positions, rotary embedding."""
        n, length = hidden_NLD.shape[:2]
        if (n, length) not in self._arguments:
            with torch.no_grad():
                self.skeleton.model(inputs_embeds=hidden_NLD, use_cache=False)
            self._arguments = {(n, length): [stub.arguments for stub in self.skeleton.model.layers]}
        return self._arguments[n, length][layer]

    def final_norm(self, rest: Mapping[str, Tensor]) -> nn.Module:
        return _filled(copy.deepcopy(self._norm), self._below("model.norm", rest), "model.norm")

    def head(self, rest: Mapping[str, Tensor]) -> nn.Module:
        """The module from normed hidden states to logits; the embedding if the checkpoint ties it to the head."""
        values = self._below("lm_head", rest)
        if "weight" not in values:
            values |= self._below("model.embed_tokens", rest)
        return _filled(copy.deepcopy(self.skeleton.lm_head), values, "lm_head")

    def _below(self, module: str, rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a module outside the decoder layers, by their names inside it."""
        names = [n for n in rest if n.startswith(f"{module}.")]
        return {n.removeprefix(f"{module}."): rest[n].to(self.device, self.dtype) for n in names}

    def _hf_config(self, config: Config) -> PretrainedConfig:
        hf = AutoConfig.for_model(**config)
        hf._attn_implementation = "sdpa"
        hf._experts_implementation = self.experts
        return hf

    def _in_memory(self, tensors: Mapping[str, Tensor], layer: int, format: Format) -> dict[str, Tensor]:
        """The layer's tensors without the experts, by their names inside the decoder layer in memory."""
        prefix = self.family.prefix(layer)
        whole = [name for e in range(format.experts) for name in self.family.expert(layer, e)]
        experts = {n for name in whole for n in (name, *self.family.factors(name))}

        def moved(name: str) -> Tensor:
            tensor = tensors[name]
            exact = self.family.kind(name) == "fixed" or not tensor.is_floating_point()
            return tensor.to(self.device, tensor.dtype if exact else self.dtype)

        return {self.family.in_memory(n.removeprefix(prefix)): moved(n) for n in tensors if n not in experts}


class _Stub(nn.Module):
    """Replaces a decoder layer, and remembers its arguments."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden_states


def _filled(module: nn.Module, values: Mapping[str, Tensor], what: str) -> nn.Module:
    """The module, made on the meta device, with these tensors. Raises ValueError if they are not exactly those it has."""
    asked, stored = ({n: t.shape for n, t in tensors.items()} for tensors in (module.state_dict(), values))
    check_tensors(what, asked, stored)
    module.load_state_dict(dict(values), assign=True)
    return module.requires_grad_(False)
