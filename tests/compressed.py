"""Checkpoints whose layers have different numbers of experts and whose experts have different ranks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeflow.arch import Family
from moeflow.model.checkpoint import Tensors, of_experts, save
from moeflow.model.formats import Format, config_of, format_of
from moeflow.model.layout import Folder, kept, read_config
from moeflow.model.moe import LowRank, MoELayer, whole

KEPT = ([0, 2, 3, 4, 6, 7], [1, 2, 3, 5, 6, 7], list(range(8)), [1, 2, 3, 5, 6, 7])
"""The experts that stay in each layer: as many of each group, where the router knows groups."""


def ranks_of(layer: int, expert: int) -> tuple[int, int, int]:
    """Ranks of gate, up and down: none in layers 0 and 3, all in layer 1, every combination in layer 2."""
    mixed = [(0, 0, 0), (7, 5, 0), (0, 0, 6), (3, 9, 4), (17, 2, 11), (0, 0, 8)]
    return ((0, 0, 0), (6, 4 + expert, 9), mixed[expert % 6], (0, 0, 0))[layer]


def factor(matrix_MN: Tensor, rank: int) -> LowRank:
    u, s, vh = torch.linalg.svd(matrix_MN, full_matrices=False)
    return LowRank((u[:, :rank] * s[:rank]).contiguous(), vh[:rank].contiguous())


def reference_layer(moe: MoELayer, layer: int) -> MoELayer:
    """The original layer with the kept experts' matrices cut to their ranks, and no expert taken out."""
    experts = list(moe.experts)
    for new, old in enumerate(KEPT[layer]):
        matrices = experts[old].matrices
        ranks = ranks_of(layer, new)[-len(matrices) :]
        cut = [m if r == 0 else factor(whole(m), r).whole() for m, r in zip(matrices, ranks, strict=True)]
        experts[old] = experts[old].with_matrices(cut)
    return replace(moe, experts=tuple(experts))


def compress(folder: Path, out: Path) -> Path:
    """The checkpoint of the experts in `KEPT`, cut to their ranks, in two files and an index."""
    config, tensors = read_config(Folder(folder)), Tensors(folder)
    family = Family.of(config)
    found = {n: t for n, t in tensors.items() if ".layers." not in n}
    formats: list[Format | None] = []
    for layer in range(family.num_layers):
        stored = [n for n in tensors if n.startswith(family.prefix(layer))]
        moe = layer in family.moe_layers
        here = {}
        for old, (new, sliced) in kept(stored, config, layer, KEPT[layer]).items():
            here[new] = of_experts(tensors[old], KEPT[layer]) if moe and sliced else tensors[old]
        for expert in range(len(KEPT[layer]) if moe else 0):
            for name, rank in zip(names := family.expert(layer, expert), ranks_of(layer, expert)[-len(names) :], strict=True):
                if rank:
                    cut = factor(here.pop(name), rank)
                    here |= dict(zip(family.factors(name), (cut.out_MR, cut.in_RN), strict=True))
        found |= here
        formats.append(format_of({n: t.shape for n, t in here.items()}, config, layer) if moe else None)
    write(found, config_of(config, formats), out)
    return out


def write(tensors: dict[str, Tensor], config: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    stems = sorted({n.rpartition(".")[0] for n in names})  # the two factors of a matrix lie in one file
    first = {n for n in names if n.rpartition(".")[0] in stems[::2]}
    parts = {"model-00001-of-00002.safetensors": [*first], "model-00002-of-00002.safetensors": [n for n in names if n not in first]}
    for file, part in parts.items():
        save({n: tensors[n] for n in part}, out / file)
    weight_map = {n: file for file, part in parts.items() for n in part}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (out / "config.json").write_text(json.dumps(config))


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def ids(n: int = 2, length: int = 20) -> Tensor:
    return torch.randint(3, 96, (n, length), generator=torch.Generator().manual_seed(1))
