"""Published checkpoints as plans see them: real configurations, headers and sizes, without the weights, in the hub's cache."""

import io
import json
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moeflow.arch import Family
from tests.running import SMALL

COMMIT = "0" * 40
COMMON: dict[str, Any] = dict(dtype="bfloat16", tie_word_embeddings=False)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistralai/Mixtral-8x7B-v0.1": ("mixtral", dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=32768,
    )),
    "Qwen/Qwen1.5-MoE-A2.7B": ("qwen2_moe", dict(
        vocab_size=151936, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=16, moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts=60,
        num_experts_per_tok=4, norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[], max_position_embeddings=8192,
    )),
    "deepseek-ai/DeepSeek-V2-Lite": ("deepseek_v2", dict(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2,
        first_k_dense_replace=1, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0, kv_lora_rank=512,
        q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=163840,
    )),
    "allenai/OLMoE-1B-7B-0924": ("olmoe", dict(
        vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False, max_position_embeddings=4096,
    )),
    "microsoft/Phi-3.5-MoE-instruct": ("phimoe", dict(
        vocab_size=32064, hidden_size=4096, intermediate_size=6400, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=16, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True,
        max_position_embeddings=131072,
    )),
}  # fmt: skip
TEXTS = {
    "allenai/c4": "en/c4-train.00000-of-01024.json.gz",
    "Salesforce/wikitext": "wikitext-2-raw-v1/test-00000-of-00001.parquet",
    "tatsu-lab/alpaca": "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
    "TIGER-Lab/MathInstruct": "MathInstruct.json",
}


def fill(cache: Path, *names: str) -> None:
    """Write these models and all texts into the hub's cache as if it had fetched them."""
    for name in names:
        model_type, config = MODELS[name]
        folder = _snapshot(cache, f"models--{name.replace('/', '--')}")
        whole = CONFIG_MAPPING[model_type](**COMMON, **config).to_dict()
        (folder / "config.json").write_text(json.dumps(whole))
        (folder / "tokenizer.json").write_text((SMALL / "tokenizer.json").read_text())
        _weights(model_type, whole, folder / "model.safetensors")
    for name, file in TEXTS.items():
        path = _snapshot(cache, f"datasets--{name.replace('/', '--')}") / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as opened:
            opened.truncate(300 << 20)
            if file.endswith(".parquet"):
                _rows(opened)


def _rows(opened: BinaryIO) -> None:
    """Make the open file one in Parquet, with one row at its beginning and what describes it at its end, where readers look."""
    made = io.BytesIO()
    pq.write_table(pa.table({name: ["some text"] for name in ("text", "instruction", "input", "output")}), made)
    whole = made.getvalue()
    described = int.from_bytes(whole[-8:-4], "little") + 8
    opened.write(whole[:-described])
    opened.seek(-described, io.SEEK_END)
    opened.write(whole[-described:])


def _snapshot(cache: Path, repository: str) -> Path:
    folder = cache / repository / "snapshots" / COMMIT
    folder.mkdir(parents=True, exist_ok=True)
    (cache / repository / "refs").mkdir(exist_ok=True)
    (cache / repository / "refs" / "main").write_text(COMMIT)
    return folder


def _weights(model_type: str, config: dict[str, Any], path: Path) -> None:
    """A file with the model's header under the hub's names, and as many bytes as the weights have, none of them on the disk."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**config))
    header, at = {}, 0
    for name, shape in _on_disk(Family.of(config), {n: tuple(t.shape) for n, t in model.state_dict().items()}):
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + at)


def _on_disk(family: Family, shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    made: list[tuple[str, tuple[int, ...]]] = []
    for name, shape in shapes.items():
        if name.endswith("experts.gate_up_proj"):
            layer, (count, twice, width) = int(name.split(".")[2]), shape
            for e in range(count):
                gate, up, down = family.expert(layer, e)
                made += [(gate, (twice // 2, width)), (up, (twice // 2, width)), (down, (width, twice // 2))]
        elif not name.endswith("experts.down_proj"):
            made.append((family.on_disk(name), shape))
    return made
