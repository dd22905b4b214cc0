"""Low-rank additions to a model's matrices, and to the stacks of its fused experts, that are trained in the place of the matrices.

LoRA (Hu et al., ICLR 2022, arXiv 2106.09685): W + alpha / rank * B A. It is added to the parameter, so that linear layers, routers
and fused experts, in whichever kernel, need no code of their own; the sum is made anew in each forward pass of a module. Shapes are
suffixes: E experts, M rows, N columns, R rank.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moeflow.model.factors import Stack
from moeflow.model.formats import Format

A, B = ".lora_a", ".lora_b"
"""Behind the name of a matrix, those of the two factors that are added to it."""

ADDITIONS = "additions"
"""The submodule of a module in which the additions to its parameters stand."""


class Addition(nn.Module):
    """From a matrix [M, N], or a stack [E, M, N] of them, to the same with the product of two factors added.

    `b` begins at zero. `a` is drawn uniformly within 1 / sqrt(N) by a generator that `seed` and `name` start, so that every process
    and every resumed run draws the same. `open_EBMN`: of a stack, 1 where something is and 0 in the padding, in a form that
    broadcasts over its B blocks of M rows each. `sparse`: nothing is added where the matrix is zero.
    """

    def __init__(
        self, shape: Iterable[int], rank: int, scale: float, *, name: str, seed: int, dtype: torch.dtype, device: torch.device,
        open_EBMN: Tensor | None = None, sparse: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.open: Tensor | None
        *experts, m, n = shape
        start = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7])
        drawn = torch.rand(*experts, rank, n, generator=torch.Generator().manual_seed(start))
        self.a = nn.Parameter(((2 * drawn - 1) * n**-0.5).to(device, dtype))
        self.b = nn.Parameter(torch.zeros(*experts, m, rank, dtype=dtype, device=device))
        self.scale, self.sparse = scale, sparse
        self.register_buffer("open", None if open_EBMN is None else open_EBMN.to(device, dtype), persistent=False)

    def forward(self, w: Tensor) -> Tensor:
        added = self.b @ self.a
        if self.open is not None:
            e, m, n = added.shape
            added = (added.view(e, self.open.shape[1], -1, n) * self.open).view(e, m, n)
        if self.sparse:
            added = added * (w != 0)
        return torch.add(w, added, alpha=self.scale)


def attach(
    model: nn.Module,
    names: Iterable[str],
    *,
    rank: int,
    alpha: float,
    seed: int,
    openings: Mapping[str, Tensor],
    sparse: bool = False,
) -> None:
    """Freeze the model and give these of its parameters an addition, of the rank asked for or their smaller side.

    `openings`: of the stacks that are padded, what `opening` says; `sparse`: what is zero in an expert stays zero. Works on
    parameters that ZeRO-3 has divided, too.
    """
    model.requires_grad_(False)
    for name in names:
        path, _, last = name.rpartition(".")
        module: Any = model.get_submodule(path)
        weight = getattr(module, last)
        shape = tuple(getattr(weight, "ds_shape", weight.shape))
        if ADDITIONS not in dict(module.named_children()):
            module.add_module(ADDITIONS, nn.ModuleDict())
        module.additions[last] = Addition(
            shape, min(rank, *shape[-2:]), alpha / rank, name=name, seed=seed, dtype=weight.dtype, device=weight.device,
            open_EBMN=openings.get(name), sparse=sparse and inside_expert(name),
        )  # fmt: skip


def inside_expert(name: str) -> bool:
    """Whether a parameter, or a tensor on disk, of this name is a matrix of experts, routed or shared."""
    return ".experts." in name or ".shared_expert" in name


def apply(model: nn.Module) -> None:
    """Let every forward pass use the sums from now on. To be called behind DeepSpeed, whose hooks make the parameters whole."""
    for module in model.modules():
        if ADDITIONS in dict(module.named_children()):
            module.register_forward_pre_hook(_begin)
            module.register_forward_hook(_end, always_call=True)


def opening(stack: Stack, format: Format, rows: int, columns: int) -> Tensor | None:
    """Where a stack of factors [E, rows, columns] is not padding: 1 or 0 for each expert, block and row or column; else None."""
    if stack.kind == "whole":
        return None
    side = rows // len(stack.matrices) if stack.kind == "in" else columns
    ranks = [[format.ranks(matrix)[e] for matrix in stack.matrices] for e in stack.experts(format)]
    open_EBR = (torch.arange(side) < torch.tensor(ranks)[..., None]).float()
    return open_EBR[..., None] if stack.kind == "in" else open_EBR[..., None, :]


def product(a: Tensor, b: Tensor, *, rank: int, alpha: float) -> Tensor:
    """What two trained factors add to their matrix, in fp32; in the padding of a stack it means nothing."""
    return (b.float() @ a.float()) * (alpha / rank)


def _begin(module: Any, _: Any) -> None:
    """Put the sums before the parameters of the same names, once for a whole pass: fused experts ask for theirs again and again."""
    for name, addition in module.additions.items():
        module.__dict__[name] = addition(module._parameters[name])


def _end(module: Any, *_: Any) -> None:
    for name in module.additions:
        module.__dict__.pop(name, None)
