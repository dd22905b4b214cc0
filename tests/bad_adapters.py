"""The rows of `test_bad_inputs.py` with an adapter beside the weights, or instead of them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.bad_inputs import LFS, Row, row
from tests.spoiling import INDEX, OTHER, SHARD, Spoil, both, holds, without


def adapter(tensors: dict[str, list[int]] | None = None, at: str = "adapter", **about: Any) -> Spoil:
    """A LoRA adapter of rank 4 on one query lies in a folder beside the model; its tensors' shapes, and what it says of itself."""
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    shapes = {f"{stem}A.weight": [4, 16], f"{stem}B.weight": [16, 4]} if tensors is None else tensors
    said = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "org/base",
    } | about

    def spoil(folder: Path) -> None:
        there = folder / at if at else folder
        there.mkdir(exist_ok=True)
        save_file({n: torch.zeros(shape) for n, shape in shapes.items()}, there / "adapter_model.safetensors")
        (there / "adapter_config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not ...}))

    return spoil


L = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
AT = ("adapter=model/adapter",)


def lora(name: str, spoil: Spoil, *says: str) -> Row:
    """A row in which the folder `adapter` beside the weights is to be merged."""
    return Row(name, spoil, says, words=AT)


ADAPTERS: list[Row] = [
    row(
        "an adapter beside the weights",
        adapter(at=""),
        "holds an adapter beside its weights (adapter_config.json)",
        "-p adapter=merge",
    ),
    row(
        "an adapter and no model",
        both(adapter(at=""), without(SHARD), without(OTHER), without(INDEX)),
        "holds an adapter of org/base",
        "-p model=org/base -p adapter=",
    ),
    row(
        "an adapter of nobody and no model",
        both(adapter(at="", base_model_name_or_path=None), without(SHARD), without(OTHER), without(INDEX)),
        "an adapter of a model that it does not name",
        "-p model=THAT_MODEL",
    ),
    Row(
        "an adapter that is not beside the weights",
        holds("x.txt", ""),
        ("holds no adapter", "leave -p adapter away"),
        words=("adapter=merge",),
    ),
    lora("an adapter of another rank", adapter(r=8), f"{L}A.weight has rank 4 where adapter_config.json says 8"),
    lora(
        "an adapter with a pattern of another rank",
        adapter(rank_pattern={"q_proj": 2}),
        "has rank 4 where adapter_config.json says 2",
    ),
    lora(
        "an adapter of another model", adapter({f"{L}A.weight": [4, 32], f"{L}B.weight": [32, 4]}), "do not fit", "of another model"
    ),
    lora(
        "an adapter of a module that is not there",
        adapter({f"{L.replace('q_proj', 'qkv_proj')}{f}": [4, 4] for f in ("A.weight", "B.weight")}),
        "changes model.layers.0.self_attn.qkv_proj, of which the model has no plain weight",
    ),
    lora("an adapter without a rank's other factor", adapter({f"{L}A.weight": [4, 16]}), "only one factor", "no lora_B"),
    lora("an adapter of DoRA", adapter(use_dora=True), "adapter_config.json at", "use_dora=true, which is no plain LoRA"),
    lora("an adapter of another kind", adapter(peft_type="VERA"), "of an adapter of kind 'VERA'"),
    lora("an adapter without factors", adapter({}), "changes nothing"),
    lora(
        "an adapter that is an LFS pointer",
        both(adapter(), holds("adapter/adapter_model.safetensors", LFS)),
        "adapter_model.safetensors",
        "is a Git LFS pointer",
    ),
]
