"""Merging a LoRA adapter into one tensor. Shapes are suffixes: M outputs and N inputs of a matrix, R rank, E experts."""

from collections.abc import Callable

import torch
from torch import Tensor

from moeflow.methods.checkpoint.adapter import Addition


def merged(name: str, tensor: Tensor, addition: Addition, read: Callable[[str], Tensor]) -> Tensor:
    """What an adapter makes of one tensor of a model, in the tensor's own precision; the sum is made in fp32, or fp64.

    `read`: the adapter's tensor with a name. Raises ValueError if it is not finite.
    """
    kind = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    made = (read(addition.whole) if addition.whole else tensor).to(kind)
    if addition.a:
        made = made + product(addition, read(addition.a), read(addition.b), kind) * addition.scale
    made = made.to(tensor.dtype)
    if not made.isfinite().all():
        raise ValueError(
            f"{name} holds NaN or infinite weights with the adapter merged; the adapter is damaged, or of another model"
        )
    return made


def product(addition: Addition, a: Tensor, b: Tensor, kind: torch.dtype) -> Tensor:
    """B · A, as what it adds to one tensor [M, N]; of fused experts, whose ranks lie beside each other, this expert's part."""
    if addition.experts > 1:
        a = a.reshape(addition.experts, -1, a.shape[1])[addition.expert]
        b = b.reshape(b.shape[0], -1, addition.experts)[..., addition.expert]
    product_MN = b.to(kind) @ a.to(kind)
    if addition.form in ("embedding", "transposed experts"):
        product_MN = product_MN.mT
    return product_MN[slice(*addition.rows)] if addition.rows else product_MN
