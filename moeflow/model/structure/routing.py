"""How a router chooses, and what an expert computes, found among what moeflow knows by comparing with the module itself.

Shapes are suffixes: N sequences, L positions, T tokens, D model width.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moeflow.arch import ARCH, Arch, Config
from moeflow.model.checkpoint import read_moe
from moeflow.model.moe import ACTIVATIONS, CLAMPED
from moeflow.model.structure.anatomy import Unknown

CLOSE = 1e-6  # of the largest number of an output
SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "sparsemixer")
GROUPS: tuple[dict[str, Any], ...] = ({}, {"groups": True, "group_score": "top2"}, {"groups": True, "group_score": "max"})


def routed(
    arch: Arch, config: Config, tensors: Mapping[str, Tensor], layer: int, block: nn.Module, vectors: tuple[str, ...]
) -> Arch:
    """The family with the arithmetic that gives this block's output on random inputs. Raises Unknown if none does.

    `arch` names the tensors; `vectors` are those of the router beside its matrix, whose meaning is not known yet.
    """
    x_NLD = torch.randn(2, 48, int(config["hidden_size"]), generator=torch.Generator().manual_seed(5))
    want_TD = output(block, x_NLD).flatten(0, 1)
    least = CLOSE * max(1.0, want_TD.abs().max().item())
    best = torch.inf
    for guess in _guesses(arch, config, vectors):
        try:
            ours_TD = read_moe(tensors, config | {ARCH: guess.to_json()}, layer)(x_NLD.flatten(0, 1))
        except (ValueError, KeyError, RuntimeError, IndexError):
            continue
        far = (ours_TD - want_TD).abs().max().item()
        if far <= least:
            return guess
        best = min(best, far)
    near = "" if best == torch.inf else f"; the nearest is {best:.1e} off"
    raise Unknown(f"no router and expert that we know computes what its MoE block does{near}")


@torch.no_grad()
def output(block: nn.Module, x_NLD: Tensor) -> Tensor:
    """What an MoE block computes, [N, L, D]. Raises Unknown if it takes more than hidden states."""
    try:
        out = block(x_NLD)
    except TypeError as error:
        raise Unknown(f"its MoE block takes more than hidden states ({' '.join(str(error).split())[:90]})") from None
    out = out[0] if isinstance(out, tuple) else out
    return out.view(x_NLD.shape)


def in_fp32(block: nn.Module, weight: str) -> bool:
    """Whether the router of this block, whose matrix has this name there, computes logits in fp32 where the model is in bf16."""
    half = copy.deepcopy(block).to(torch.bfloat16)
    sides = tuple(half.get_parameter(weight).shape)
    watch = _Products({sides, sides[::-1]})
    with torch.no_grad(), watch, suppress(Exception):  # of what comes behind the router: not every expert runs in bf16
        half(torch.randn(2, 24, sides[1], generator=torch.Generator().manual_seed(5)).to(torch.bfloat16))
    return torch.float32 in watch.seen


class _Products(TorchDispatchMode):
    """Notes the precision of every product with a matrix of one of these shapes."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.seen = shapes, set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.__name__:
            self.seen |= {t.dtype for t in args if isinstance(t, Tensor) and tuple(t.shape) in self.shapes}
        return func(*args, **(kwargs or {}))


def _guesses(arch: Arch, config: Config, vectors: tuple[str, ...]) -> Iterator[Arch]:
    """Every combination of what we know, the most common first."""
    scales = ["", *(k for k, v in config.items() if "scal" in k and type(v) in (int, float) and v not in (0, 1))]
    acts = ["", *(a for a in (*ACTIVATIONS, CLAMPED) if a != config.get("hidden_act"))]
    sides = [False, True]
    for act, weighs_input, scale, groups, roles in product(acts, sides, scales, GROUPS, _roles(vectors)):
        common = {"scale_key": scale, "weighs_input": weighs_input, "activation": act} | groups | roles
        for score, normalize in product(SCORES, ("always", "never")):
            if score != "sparsemixer" or not (roles or groups or normalize == "always"):
                yield replace(arch, **(common | {"score": score, "normalize": normalize}))


def _roles(vectors: tuple[str, ...]) -> list[dict[str, str]]:
    """What the router's vectors may be: added for the choice only, or to the logits."""
    names = ("router_bias", "router_offset")
    if not vectors:
        return [{}]
    if len(vectors) == 1:
        return [{name: vectors[0]} for name in names]
    return [dict(zip(names, pair, strict=True)) for pair in (vectors[:2], vectors[1::-1])]
