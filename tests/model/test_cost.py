"""What a token costs, from configurations alone: the papers' own figures, and what transformers really keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from moeflow.arch import ARCH, LAYERS
from moeflow.model.cost import active_parameters, cache_bytes, forward_flops
from moeflow.model.layout import Folder, read_config
from tests import normal, tiny
from tests.model.test_other_families import some

MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2, "dtype": "bfloat16",
}  # fmt: skip


def gone(layers: int) -> dict:
    said = [{"experts": 0, "gone": "moe"}] * layers + [{"experts": 8}] * (32 - layers)
    return MIXTRAL | {"model_type": "moeflow_mixtral", LAYERS: said}


def test_operations_of_mixtral_are_those_of_the_paper() -> None:
    """He et al., Table 3, at 2,048 tokens: 54.4 T; 42.9 T without 8 MoE blocks, 46.0 T without 5 decoder layers."""
    whole = forward_flops(MIXTRAL, 2048) / 1e12
    assert whole == pytest.approx(54.4, abs=0.05)
    assert forward_flops(gone(8), 2048) / 1e12 == pytest.approx(42.9, abs=0.05)
    assert forward_flops(MIXTRAL | {"num_hidden_layers": 27}, 2048) / 1e12 == pytest.approx(46.0, abs=0.05)
    assert whole - forward_flops(gone(8), 2048) / 1e12 == pytest.approx(11.5, abs=0.05)
    assert forward_flops(MIXTRAL | {"num_local_experts": 6}, 2048) / 1e12 == pytest.approx(54.4, abs=0.05)


def test_sixty_four_experts_of_mixtral_are_21_gib() -> None:
    whole, without = (2 * parameters(config) / 2**30 for config in (MIXTRAL, gone(8)))
    assert whole - without == pytest.approx(21.0, abs=0.05)
    assert active_parameters(MIXTRAL) - active_parameters(gone(8)) == 8 * (2 * 3 * 4096 * 14336 + 8 * 4096 + 4096)


def parameters(config: dict) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return sum(p.numel() for p in model.parameters())


def test_the_cache_is_what_transformers_keeps(family: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(family).eval()
    with torch.inference_mode():
        cache = model(torch.arange(3, 13)[None], use_cache=True).past_key_values
    assert kept_by(cache) == 10 * cache_bytes(read_config(Folder(family)))


def kept_by(cache: Any) -> int:
    """The bytes of keys, values, and the keys by which tokens are chosen; layers of hybrids may have none."""
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values", "indexer_keys")]
    return sum(tensor.nbytes for tensor in kept if tensor is not None)


@pytest.mark.parametrize(
    "name", some("nemotron_h", "qwen3_next", "mimo_v2_flash", "glm_moe_dsa", "lfm2_moe", "gpt_oss", "llama4_text")
)
def test_only_layers_with_attention_have_a_cache_and_pairs_of_positions(name: str) -> None:
    arch, fields = normal.FAMILIES[name]
    more = {"sliding_window": 64, "attention_chunk_size": 64}  # so that no key is dropped
    hf = CONFIG_MAPPING[name](**(tiny.COMMON | fields | {k: v for k, v in more.items() if k in fields}))
    config = hf.to_dict() | {ARCH: arch.to_json(), "dtype": "float32"}
    model = AutoModelForCausalLM.from_config(hf).eval()
    with torch.inference_mode():
        cache = model(torch.arange(3, 13)[None], use_cache=True).past_key_values
    assert kept_by(cache) == 10 * cache_bytes(config)
    layers = len([layer for layer in cache.layers if getattr(layer, "keys", None) is not None])
    keys, values = {"mimo_v2_flash": (8, 8), "glm_moe_dsa": (16, 8)}.get(name, (8, 8))
    pairs = forward_flops(config, 200) - 2 * forward_flops(config, 100)  # what grows with the square of the length
    assert pairs == 2 * (200**2 - 2 * 100**2) * layers * 4 * (keys + values)


@pytest.mark.parametrize(
    "name, rank",  # glm_moe_dsa's indexer reads the shorter vector
    [("deepseek_v2", None), ("deepseek_v2", 24), ("deepseek_v3", None), ("deepseek_v3", 24), ("glm_moe_dsa", 24)],
)
def test_queries_may_be_computed_at_once_or_from_a_shorter_vector(name: str, rank: int | None) -> None:
    """DeepSeek-V2-Lite has no `q_lora_rank`; its class has the matrices of the other way, too, and they are None."""
    fields = normal.FAMILIES[name][1] if name in normal.FAMILIES else tiny.FAMILIES[name]
    hf = CONFIG_MAPPING[name](**(tiny.COMMON | fields | {"q_lora_rank": rank}))
    arch = {ARCH: normal.FAMILIES[name][0].to_json()} if name in normal.FAMILIES else {}
    config = hf.to_dict() | arch | {"dtype": "float32"}
    pairs = forward_flops(config, 200) - 2 * forward_flops(config, 100)
    heads = hf.num_attention_heads * (hf.qk_nope_head_dim + hf.qk_rope_head_dim + hf.v_head_dim)
    assert pairs == 2 * (200**2 - 2 * 100**2) * hf.num_hidden_layers * heads
    assert cache_bytes(config) >= 4 * hf.num_hidden_layers * (hf.kv_lora_rank + hf.qk_rope_head_dim)
