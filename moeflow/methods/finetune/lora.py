"""LoRA: train low-rank additions to a model's matrices, and to the stacks of its fused experts, instead of the matrices.

Hu et al., ICLR 2022, arXiv 2106.09685: W + alpha / rank * B A. The product is added to the parameter itself, so that linear layers,
routers and fused experts in any kernel need no code of their own. The sum is made anew in each forward pass of a module. Shapes
are suffixes: E experts, M rows, N columns, R rank.
"""

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moeflow.arch import Family
from moeflow.methods.finetune.packed import Rounding, Scaling, codes_pace, points_of
from moeflow.methods.finetune.recipe import Recipe
from moeflow.model.checkpoint import Tensors
from moeflow.model.factors import STACKS, form_of, shape_of
from moeflow.model.formats import layer_formats
from moeflow.model.packed import schemes_of

A, B = ".lora_a", ".lora_b"
"""The names of a matrix's two factors: the matrix's own name with these endings."""

SCALES, CODES = ".scales", ".codes"
"""The same of the changes of a packed matrix's scales and codes."""

ENDINGS = {"a": A, "b": B, "scales": SCALES, "codes": CODES}
"""These endings, by the names of the parameters of what is added to a module."""

ADDITIONS = "additions"
"""The submodule that holds the additions to a module's parameters."""


class Addition(nn.Module):
    """Adds the product of two factors to `weight`, a matrix [M, N] or stack [E, M, N], which ZeRO-3 may have divided.

    The rank is the recipe's, or the smaller side if that is less. `b` starts at zero. `a` is drawn uniformly within 1 / sqrt(N)
    from a generator seeded with the recipe's seed and `name`, so that every process and every resumed run draws the same. If the
    matrices of a stack lie otherwise in memory, `shape` is [E, M, N], and `joined` makes of such a product what is added.
    `keep_zeros`: add nothing where the matrix is zero.
    """

    def __init__(
        self, weight: Tensor, name: str, recipe: Recipe,
        *, shape: tuple[int, ...] = (), joined: Callable[[Tensor], Tensor] | None = None, keep_zeros: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        *experts, m, n = shape or shape_of(weight)
        rank = min(recipe.rank, m, n)
        start = int.from_bytes(hashlib.sha256(f"{recipe.seed}/{name}".encode()).digest()[:7])
        drawn = torch.rand(*experts, rank, n, generator=torch.Generator().manual_seed(start))
        self.a = nn.Parameter(((2 * drawn - 1) * n**-0.5).to(weight))
        self.b = nn.Parameter(weight.new_zeros(*experts, m, rank))
        self.scale, self.joined, self.keep_zeros = recipe.scale, joined, keep_zeros

    def forward(self, w: Tensor) -> Tensor:
        added = self.b @ self.a
        if self.joined is not None:
            added = self.joined(added)
        if self.keep_zeros:
            added = added * (w != 0)
        return torch.add(w, added, alpha=self.scale)


def attach(
    model: Any, names: Iterable[str], recipe: Recipe,
    checkpoint: Tensors | None = None, divide: Callable[[nn.Module], object] | None = None,
) -> None:  # fmt: skip
    """Freeze a model of transformers and give these parameters additions, or new scales and codes to packed experts.

    `checkpoint`: what the model was loaded from, if the recipe trains packed experts themselves. `divide` divides the parameters of
    what was attached between processes, before the next is: codes are as large as the weights.
    """
    model.requires_grad_(False)
    config = model.config.to_dict()
    family, formats, stacks = Family.of(config), layer_formats(config), {s.name: s for s in STACKS}
    schemes = {} if checkpoint is None else schemes_of({n: t.shape for n, t in checkpoint.info.items()}, config)
    for name in names:
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        weight, lies = getattr(module, last), dict[str, Any]()
        stack = stacks.get(last) if path.endswith(f"{family.arch.block}.experts") else None
        layer = int(name.split(".")[2]) if stack else -1
        format = formats[layer] if stack else None
        if stack is not None and format is not None and stack.factors:
            lies = {"shape": stack.apart(format, shape_of(weight)[-1]), "joined": partial(stack.joined, format=format)}
        if ADDITIONS not in dict(module.named_children()):
            module.add_module(ADDITIONS, nn.ModuleDict())
        if checkpoint is not None and stack is not None and format is not None and layer in schemes:
            group, axis = schemes[layer].group, 1 if form_of(module).transposed and "joined" not in lies else 2
            lies = {"shape": shape_of(weight), "axis": axis, **lies}
            if recipe.packed == "codes":
                points = points_of(checkpoint, family, layer, stack, format, schemes[layer], module)
                module.additions[last] = Rounding(weight, group, points, codes_pace(recipe.steps), **lies)
            else:
                module.additions[last] = Scaling(weight, group, **lies)
        else:
            keep_zeros = bool(recipe.keep_zeros) and family.in_expert(family.on_disk(name))
            module.additions[last] = Addition(weight, name, recipe, keep_zeros=keep_zeros, **lies)
        if divide is not None:
            divide(module.additions[last])


def apply(model: nn.Module) -> None:
    """Make every forward pass use the sums from now on. Call it after DeepSpeed has added its hooks, which gather parameters."""
    for module in model.modules():
        if ADDITIONS in dict(module.named_children()):
            module.register_forward_pre_hook(_begin)
            module.register_forward_hook(_end, always_call=True)


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What two trained factors add to their matrix, in fp32; beyond the rank of a factor it is meaningless."""
    return (b.float() @ a.float()) * scale


def _begin(module: Any, _: Any) -> None:
    """Replace the parameters by the sums once per forward pass, because fused experts read theirs again and again."""
    for name, addition in module.additions.items():
        module.__dict__[name] = addition(module._parameters[name])


def _end(module: Any, *_: Any) -> None:
    for name in module.additions:
        module.__dict__.pop(name, None)
