"""LoRA's additions as an adapter in PEFT's format, for programs that keep the model and its adapter apart.

Shapes are suffixes: E experts, M rows, N columns, R rank. PEFT's factors of fused experts are stacked: A [E · R, N], B [M, R · E].
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeflow.methods.finetune.lora import A, B
from moeflow.methods.finetune.recipe import Recipe
from moeflow.model.checkpoint import save
from moeflow.model.factors import STACKS
from moeflow.model_files import ADAPTER_CONFIG

WEIGHTS, PREFIX, VERSION = "adapter_model.safetensors", "base_model.model.", "0.19.1"
"""The file's name, what PEFT puts before every module's, and the first release with factors of fused experts as they are here."""


def inexpressible(trained: Mapping[str, Tensor], recipe: Recipe) -> str:
    """Why no adapter of PEFT says what was trained; "" if one does."""
    if recipe.keep_zeros:
        return "experts keep their zeros, which an adapter's product would fill"
    factors = {s.name for s in STACKS if s.factors}
    for name in trained:
        if not name.endswith((A, B)):
            return f"{name} was trained whole"
        if name.removesuffix(A).removesuffix(B).rpartition(".")[2] in factors:
            return f"{name.removesuffix(A).removesuffix(B)} is a factor of low-rank experts"
    return ""


def write_adapter(trained: Mapping[str, Tensor], model: nn.Module, recipe: Recipe, out: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` into `out`.

    `trained`: LoRA's factors by the names that `trained.parameters_of` gives them; `model`: the one that was trained.
    """
    held: dict[str, Tensor] = {}
    modules: list[str] = []
    ranks: dict[str, int] = {}
    stacked: dict[str, list[str]] = defaultdict(list)  # parameters by their module, in the order in which PEFT wraps them
    for name, _ in model.named_parameters():
        if f"{name}{A}" in trained:
            path, _, last = name.rpartition(".")
            if isinstance(model.get_submodule(path), nn.Linear):
                modules.append(path)
                held |= _pair(path, trained[f"{name}{A}"], trained[f"{name}{B}"])
            else:
                stacked[path].append(last)
            if (rank := trained[f"{name}{A}"].shape[-2]) != recipe.rank:
                ranks[path if path in modules else name] = rank
    for path, names in stacked.items():
        turned = bool(getattr(model.get_submodule(path), "is_transposed", False))
        for depth, last in enumerate(reversed(names)):  # the last is the outermost
            a, b = trained[f"{path}.{last}{A}"], trained[f"{path}.{last}{B}"]
            held |= _pair(f"{path}{'.base_layer' * depth}", *_stacked(a, b, turned))
    parameters = [f"{path}.{last}" for path, names in stacked.items() for last in names]
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": VERSION, "base_model_name_or_path": None,
        "r": recipe.rank, "lora_alpha": recipe.scale * recipe.rank, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "target_modules": modules, "target_parameters": parameters or None,
        "rank_pattern": ranks, "alpha_pattern": {name: recipe.scale * rank for name, rank in ranks.items()},
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    save(held, out / WEIGHTS)
    (out / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def _pair(module: str, a_RN: Tensor, b_MR: Tensor) -> dict[str, Tensor]:
    at = f"{PREFIX}{module}.lora_"
    return {f"{at}A.weight": a_RN.contiguous(), f"{at}B.weight": b_MR.contiguous()}


def _stacked(a: Tensor, b: Tensor, turned: bool) -> tuple[Tensor, Tensor]:
    """The factors [E, R, N] and [E, M, R] of a stack as PEFT has them; those of a matrix that is no linear layer as they are.

    `turned`: the stack holds each expert on its side, and PEFT multiplies the factors the other way round.
    """
    if a.dim() == 2:
        return a, b
    a_ERN, b_EMR = (b.transpose(1, 2), a.transpose(1, 2)) if turned else (a, b)
    return a_ERN.flatten(0, 1), torch.movedim(b_EMR, 0, 2).flatten(1, 2)
