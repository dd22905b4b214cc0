"""A quantized matrix: its codes, scales and zero points.

Shapes are suffixes: M outputs and N inputs of a matrix, G groups of inputs. Batch dimensions, a layer's experts, may come first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeflow.methods.slim.grid import Grid


@dataclass(frozen=True)
class Quantized:
    """Codes, int8 and signed for any number of bits; scales in the dtype in which they are stored; int8 zero points or None."""

    codes_MN: Tensor
    scale_MG: Tensor
    zero_MG: Tensor | None
    grid: Grid

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [M, N] that the codes stand for: scale times (code minus zero point), multiplied in fp32."""
        shift_MGg = self.codes_MN.float().unflatten(-1, (self.scale_MG.shape[-1], -1))
        if self.zero_MG is not None:
            shift_MGg -= self.zero_MG[..., None]
        return shift_MGg.mul_(self.scale_MG[..., None].float()).flatten(-2).to(dtype)

    @staticmethod
    def stacked(parts: "Sequence[Quantized]") -> "Quantized":
        """Stack matrices of one shape and grid into a batch [E, M, N]."""
        zeros = [part.zero_MG for part in parts if part.zero_MG is not None]
        codes, scales = [part.codes_MN for part in parts], [part.scale_MG for part in parts]
        return Quantized(torch.stack(codes), torch.stack(scales), torch.stack(zeros) if zeros else None, parts[0].grid)

    def reshaped(self, *batch: int) -> "Quantized":
        """The same matrices with batch dimensions of this shape."""
        return self._each(lambda t: t.reshape(*batch, *t.shape[-2:]))

    def __getitem__(self, index: int | slice) -> "Quantized":
        """One matrix of the batch, or several."""
        return self._each(lambda t: t[index])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Quantized":
        zero_MG = None if self.zero_MG is None else change(self.zero_MG)
        return Quantized(change(self.codes_MN), change(self.scale_MG), zero_MG, self.grid)
