"""A tiny checkpoint of each kind of Mixture-of-Experts model, as the hub has it, with the tokenizer of the small model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoTokenizer

from tests import layouts, normal
from tests.methods.test_mxfp4 import coded
from tests.running import SMALL
from tests.tiny import COMMON

TOKENS: dict[str, Any] = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
QUANTIZED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}


def in_stacks(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        kind = layouts.KINDS[name]
        config = kind.config()
        for key, value in TOKENS.items():
            setattr(config.get_text_config(), key, value)
        layouts.made(kind, config).save_pretrained(folder, **kind.saved)

    return write


def in_mxfp4(folder: Path) -> None:
    in_stacks("gpt_oss")(folder)
    layouts.edit(folder, coded)
    layouts.configure(folder, lambda config: config | {"dtype": "bfloat16", "quantization_config": QUANTIZED})


def one_by_one(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        normal.write(name, folder, **TOKENS)
        shutil.rmtree(folder)
        normal.hub(folder).rename(folder)

    return write


def hybrid(folder: Path) -> None:
    """Mamba and attention take turns, and a dense network beside the MoE block reads the same norm."""
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1}
    sizes = {"intermediate_size": 24, "shared_intermediate_size": 40, "num_local_experts": 8, "num_experts_per_tok": 3}
    kinds = {"layer_types": ["mamba", "attention", "mamba"]}
    config = CONFIG_MAPPING["granitemoehybrid"](**(COMMON | TOKENS | sizes | mamba | kinds))
    layouts.made(layouts.Kind(lambda: config, "GraniteMoeHybridForCausalLM", layouts.KINDS["granitemoe"].found)).save_pretrained(
        folder
    )


KINDS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "fused": ("granitemoe", in_stacks("granitemoe")),
    "transposed": ("gpt_oss", in_stacks("gpt_oss")),
    "mxfp4": ("gpt_oss", in_mxfp4),
    "wrapped": ("qwen3_5_moe", in_stacks("qwen3_5_moe")),
    "ungated": ("nemotron_h", one_by_one("nemotron_h")),
    "top-1": ("llama4_text", one_by_one("llama4_text")),
    "hybrid": ("granitemoehybrid", hybrid),
    "corrected": ("glm4_moe", one_by_one("glm4_moe")),
}
"""The model type of each kind, and what writes a checkpoint of it into a folder."""


def write(kind: str, folder: Path) -> Path:
    tokenizer: Any = AutoTokenizer.from_pretrained(SMALL)
    KINDS[kind][1](folder)
    tokenizer.save_pretrained(folder)
    return folder
