"""Experts whose inputs were scaled before they were rounded, and how the rest of the block takes the scale back.

Shapes are suffixes: E experts, D model width, F expert width.
"""

from dataclasses import dataclass

from torch import Tensor

from moeflow.methods.slim.quantized import Quantized


@dataclass(frozen=True)
class ScaledExperts:
    """A layer's experts on a grid, and what has to be done to the rest of the block for it to remain the same.

    `scale_D`: what the norm's weight is divided by and the columns of all it feeds are multiplied by (`fold` does both). The
    experts have theirs in them, and also `inner_EF`, which divides the rows of up and multiplies the columns of down.
    """

    gate_EFD: Quantized
    up_EFD: Quantized
    down_EDF: Quantized
    scale_D: Tensor
    inner_EF: Tensor


def fold(norm_D: Tensor, scale_D: Tensor, *fed: Tensor) -> tuple[Tensor, ...]:
    """The norm's weight [D] divided by the scale and each matrix it feeds, [.., D], multiplied by it, in their own precisions.

    Give *all* that the norm feeds: the router's rows, a shared expert's gate and its gate and up, and experts that were not scaled
    yet. Raises ValueError where the widths differ.
    """
    if bad := [tuple(t.shape) for t in (norm_D, *fed) if t.shape[-1] != len(scale_D)]:
        raise ValueError(f"a scale of {len(scale_D)} inputs cannot be folded into {bad[0]}; give what the same norm feeds")
    return (norm_D.float() / scale_D).to(norm_D.dtype), *((m.float() * scale_D).to(m.dtype) for m in fed)
