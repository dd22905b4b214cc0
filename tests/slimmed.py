"""What a slimmed checkpoint says of itself, multiplied out, which tokens its experts were given, and the methods on a grid."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from moeflow.arch import Family
from moeflow.methods.moments import second_moment
from moeflow.methods.slim.gptq import gptq
from moeflow.methods.slim.grid import Grid
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.quantized import Quantized
from moeflow.methods.slim.rounding import round_to_nearest
from moeflow.model.checkpoint import save
from moeflow.model.layout import Folder, read_config
from moeflow.model.packed import ADDED_IN, ADDED_OUT, PACKED, SCALE, SHAPE
from tests.models import loaded, logits
from tests.running import facts_of

FOUR: dict[str, Any] = {"bits": 4, "group": 8}


def moments(inputs: Tensor | Sequence[Tensor]) -> Tensor:
    """The second moments [.., N, N] of inputs [.., T, N], whose numbers of tokens may differ."""
    if isinstance(inputs, Tensor) and inputs.dim() == 2:
        return second_moment(inputs)
    return torch.stack([moments(x) for x in inputs])


def on(grid: Grid, method: str = "gptq", **more: Any) -> Slimming:
    """The options of a method that quantizes to this grid."""
    return Slimming(method, bits=grid.bits, symmetric=grid.symmetric, group=grid.group, packed=False, **more)


def compensated(
    w_MN: Tensor, grid: Grid, inputs: Tensor | Sequence[Tensor], scale_dtype: torch.dtype = torch.float32, **more: Any
) -> Quantized:
    """The weights rounded by GPTQ."""
    return gptq(w_MN, moments(inputs), on(grid, **more), scale_dtype)


def nearest(w_MN: Tensor, grid: Grid, scale_dtype: torch.dtype = torch.float32) -> Quantized:
    """The weights rounded to nearest."""
    return round_to_nearest(w_MN, None, on(grid, "round_to_nearest"), scale_dtype)


def reports(folder: Path) -> list[dict[str, Any]]:
    return [{"layer": i} | done for i, each in facts_of(folder, "slim.layer").items() for done in each]


def plain(folder: Path, out: Path) -> Path:
    """The checkpoint with every packed matrix multiplied out, by codes and scales as compressed-tensors defines them, and what is
    added beside it."""
    out.mkdir()
    raw = {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}
    whole = dict(raw)
    for name in [n for n in raw if n.endswith(PACKED)]:
        stem = name.removesuffix(PACKED)
        shape, scale = whole.pop(stem + SHAPE).tolist(), whole.pop(stem + SCALE)
        bits = whole[name].shape[1] * 32 // shape[1]
        words = whole.pop(name).numpy().astype("uint32")
        codes = torch.tensor([[(int(w) >> (bits * k)) % (1 << bits) for w in row for k in range(32 // bits)] for row in words])
        codes = codes[:, : shape[1]] - (1 << (bits - 1))
        whole[stem] = (codes.view(*scale.shape, -1) * scale[..., None].double()).flatten(1).float()
        if stem + ADDED_OUT in whole:
            whole[stem] += whole.pop(stem + ADDED_OUT).float() @ whole.pop(stem + ADDED_IN).float()
    save(whole, out / "model.safetensors")
    config = read_config(Folder(folder))
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config))
    return out


def routed(source: Path, folder: Path, layer: int) -> tuple[Tensor, Tensor]:
    """The inputs [T, D] of a layer's MoE block in the whole model, and which experts each token goes to [T, E]."""
    model, family = loaded(source), Family.of(read_config(Folder(source)))
    hooked: dict[str, Tensor] = {}
    block = model.model.layers[layer].get_submodule(family.arch.block)
    block.register_forward_pre_hook(lambda _, x: hooked.update(x=x[0].flatten(0, 1)))
    block.experts.register_forward_pre_hook(lambda _, x: hooked.update(index=x[1]))
    logits(model, folder)
    chosen = torch.zeros(len(hooked["x"]), 8, dtype=torch.bool).scatter(1, hooked["index"], True)
    return hooked["x"], chosen
