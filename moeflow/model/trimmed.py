"""What is left of a decoder layer whose routed experts are gone: its shared expert, or nothing, and then no norm before it either.

Shapes are suffixes: N sequences, L positions, D model width.
"""

import torch
from torch import Tensor, nn

from moeflow.arch import Family
from moeflow.model.formats import Format


class Nothing(nn.Module):
    """In the place of a MoE block that is gone: what it adds to the residual stream."""

    def forward(self, x_NLD: Tensor) -> Tensor:
        return torch.zeros_like(x_NLD)


class SharedAlone(nn.Module):
    """In the place of a MoE block without routed experts: its shared expert and that one's gate, under the names that they had."""

    def __init__(self, block: nn.Module, family: Family) -> None:
        super().__init__()
        assert family.arch.shared is not None
        self.expert = family.arch.shared[0].split(".")[-3]
        self.add_module(self.expert, block.get_submodule(self.expert))
        self.gate = family.arch.shared_gate.split(".")[-2] if family.arch.shared_gate else ""
        if self.gate:
            self.add_module(self.gate, block.get_submodule(self.gate))

    def forward(self, x_NLD: Tensor) -> Tensor:
        y_NLD: Tensor = self.get_submodule(self.expert)(x_NLD)
        return self.get_submodule(self.gate)(x_NLD).sigmoid() * y_NLD if self.gate else y_NLD


def take_out(layer: nn.Module, family: Family, format: Format) -> None:
    """Take out of a decoder layer of transformers what this format says is gone (He et al., arXiv 2406.02500, Layer Drop).

    Without its MoE block a layer loses the norm before it, too, and the residual stream passes unchanged.
    """
    if format.gone == "moe":
        layer.set_submodule(family.arch.block, Nothing())
        layer.post_attention_layernorm = nn.Identity()
    else:
        layer.set_submodule(family.arch.block, SharedAlone(layer.get_submodule(family.arch.block), family))
