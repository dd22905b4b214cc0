"""The modules of a decoder layer without routed experts: the shared expert is left, or nothing, not even the norm before the block.

Shapes are suffixes: N sequences, L positions, D model width.
"""

import ast
import inspect
import textwrap
from typing import Any

import torch
from torch import Tensor, nn

from moeflow.arch import Family
from moeflow.model.formats import Format


class Nothing(nn.Module):
    """Replaces a MoE block that is gone: adds nothing to the residual stream."""

    def __init__(self, *, pair: bool = False) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, x_NLD: Tensor) -> Any:
        y_NLD = torch.zeros_like(x_NLD)
        return (y_NLD, None) if self.pair else y_NLD


class SharedAlone(nn.Module):
    """Replaces a MoE block that has lost its routed experts: the shared expert and its gate, under their old names."""

    def __init__(self, block: nn.Module, family: Family, *, pair: bool = False) -> None:
        super().__init__()
        self.expert, *self.gate = family.shared_modules
        self.pair = pair
        for name in family.shared_modules:
            self.add_module(name, block.get_submodule(name))

    def forward(self, x_NLD: Tensor) -> Any:
        y_NLD: Tensor = self.get_submodule(self.expert)(x_NLD)
        for name in self.gate:
            y_NLD = self.get_submodule(name)(x_NLD).sigmoid() * y_NLD
        return (y_NLD, None) if self.pair else y_NLD


class Unchanged(nn.Identity):
    """Replaces a norm that is gone. It has an empty weight, because some layers ask for the norm's precision."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0), persistent=False)


def take_out(layer: nn.Module, family: Family, format: Format) -> None:
    """Remove from a decoder layer of transformers what `format.gone` says (He et al., arXiv 2406.02500, Layer Drop).

    If the MoE block goes, so does the norm before it if it feeds that block alone, and the residual stream passes unchanged.
    """
    block = layer.get_submodule(family.arch.block)
    pair = returns_a_tuple(block)
    if format.gone == "moe":
        layer.set_submodule(family.arch.block, Nothing(pair=pair))
        if not family.arch.norm_feeds_more:
            layer.set_submodule(family.arch.norm, Unchanged())
    else:
        layer.set_submodule(family.arch.block, SharedAlone(block, family, pair=pair))


def returns_a_tuple(module: nn.Module) -> bool:
    """Whether a module of transformers returns more than one value, by the text of its code: it cannot run without weights."""
    text = textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward)))
    returned = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Return)]
    return bool(returned) and isinstance(returned[-1], ast.Tuple)
