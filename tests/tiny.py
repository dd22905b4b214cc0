"""Tiny random checkpoints of every family, written by transformers itself, with routers that really choose."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

COMMON = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)
MLA = dict(kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=4)
FAMILIES: dict[str, dict] = {
    "mixtral": dict(intermediate_size=48, num_local_experts=8, num_experts_per_tok=2),
    "qwen2_moe": dict(
        intermediate_size=48, moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=8,
        num_experts_per_tok=3, norm_topk_prob=False, mlp_only_layers=[1], decoder_sparse_step=1,
    ),
    "qwen3_moe": dict(
        intermediate_size=48, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True,
        head_dim=8, decoder_sparse_step=1, mlp_only_layers=[],
    ),
    "olmoe": dict(intermediate_size=24, num_experts=8, num_experts_per_tok=3, norm_topk_prob=False),
    "phimoe": dict(intermediate_size=24, num_local_experts=8, num_experts_per_tok=2),
    "deepseek_v2": dict(
        intermediate_size=48, moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2,
        first_k_dense_replace=1, topk_method="group_limited_greedy", n_group=2, topk_group=1, routed_scaling_factor=1.7,
        **MLA,
    ),
    "deepseek_v3": dict(
        intermediate_size=48, moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=1,
        first_k_dense_replace=1, n_group=2, topk_group=1, routed_scaling_factor=2.5, norm_topk_prob=True, **MLA,
    ),
}  # fmt: skip


def families(without: Sequence[str] = ()) -> list[Any]:
    """All families but those `without` which a test has no meaning for, as its parameters; `make test` takes the `turn` of them."""
    names = [name for name in FAMILIES if name not in without]
    return [pytest.param(name, marks=pytest.mark.family(name, among=names)) for name in names]


def turn(test: str, names: Sequence[str]) -> tuple[str, str]:
    """The two of the named families that `make test` runs this test on: the first, and one that depends on the test's name."""
    first, *others = names
    return first, others[zlib.crc32(test.encode()) % len(others)]


def write(family: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A checkpoint of `family` in `folder`; `changes` go over its configuration."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**(COMMON | FAMILIES.get(family, {}) | changes))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "e_score_correction_bias" in name:
                tensor.copy_(torch.randn_like(tensor) * 0.1)
            elif tensor.dim() > 1 and "embed" not in name:
                tensor.copy_(torch.randn_like(tensor) * (1.0 if ".gate.weight" in name or "router" in name else 0.2))
    model.to(dtype).save_pretrained(folder)
    return folder
