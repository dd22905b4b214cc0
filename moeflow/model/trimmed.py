"""The modules of a decoder layer without routed experts: the shared expert is left, or nothing, not even the norm before the block.

Shapes are suffixes: N sequences, L positions, D model width.
"""

import torch
from torch import Tensor, nn

from moeflow.arch import Family
from moeflow.model.formats import Format


class Nothing(nn.Module):
    """Replaces a MoE block that is gone: adds nothing to the residual stream."""

    def forward(self, x_NLD: Tensor) -> Tensor:
        return torch.zeros_like(x_NLD)


class SharedAlone(nn.Module):
    """Replaces a MoE block that has lost its routed experts: the shared expert and its gate, under their old names."""

    def __init__(self, block: nn.Module, family: Family) -> None:
        super().__init__()
        self.expert, *self.gate = family.shared_modules
        for name in family.shared_modules:
            self.add_module(name, block.get_submodule(name))

    def forward(self, x_NLD: Tensor) -> Tensor:
        y_NLD: Tensor = self.get_submodule(self.expert)(x_NLD)
        for name in self.gate:
            y_NLD = self.get_submodule(name)(x_NLD).sigmoid() * y_NLD
        return y_NLD


def take_out(layer: nn.Module, family: Family, format: Format) -> None:
    """Remove from a decoder layer of transformers what `format.gone` says (He et al., arXiv 2406.02500, Layer Drop).

    If the MoE block goes, so does the norm before it, and the residual stream passes unchanged.
    """
    if format.gone == "moe":
        layer.set_submodule(family.arch.block, Nothing())
        layer.set_submodule(family.arch.norm, nn.Identity())
    else:
        layer.set_submodule(family.arch.block, SharedAlone(layer.get_submodule(family.arch.block), family))
