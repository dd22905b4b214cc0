"""Experts whose inputs were scaled before rounding, and folding of the scale into the rest of the block.

Shapes are suffixes: E experts, D model width, F expert width.
"""

from dataclasses import dataclass

from torch import Tensor

from moeflow.methods.slim.quantized import Quantized


@dataclass(frozen=True)
class ScaledExperts:
    """A layer's experts on a grid, and the scales that keep the block's outputs the same.

    `scale_D` divides the norm's weight and multiplies the columns of all that the norm feeds (`fold` does both). The experts
    already contain it, and also `inner_EF`, which divides the rows of up and multiplies the columns of down.
    """

    gate_EFD: Quantized
    up_EFD: Quantized
    down_EDF: Quantized
    scale_D: Tensor
    inner_EF: Tensor


def fold(norm_D: Tensor, scale_D: Tensor, *fed: Tensor) -> tuple[Tensor, ...]:
    """Divide the norm's weight [D] by the scale and multiply each matrix that it feeds, [.., D], by it, in their own dtypes.

    Give *all* that the norm feeds: the router, a shared expert's own gate, its gate and up matrices, and experts that are not
    scaled yet. Raises ValueError if the widths differ.
    """
    if bad := [tuple(t.shape) for t in (norm_D, *fed) if t.shape[-1] != len(scale_D)]:
        raise ValueError(f"a scale of {len(scale_D)} inputs cannot be folded into {bad[0]}; give what the same norm feeds")
    return (norm_D.float() / scale_D).to(norm_D.dtype), *((m.float() * scale_D).to(m.dtype) for m in fed)
