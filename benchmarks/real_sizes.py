"""Checkpoints of real size that need no disk: true headers, sizes and configuration, and holes in the place of weights.

`plan` reads headers and configuration alone, so what it says of such a folder is what it says of the published model.
"""

import json
import shutil
import struct
from math import prod
from pathlib import Path
from typing import Any

from moeflow.arch import EMBEDDING, Family
from moeflow.arch.found import shapes_of

SMALL = Path(__file__).parents[1] / "models/mixtral-small"  # whose tokenizer stands in for the real one
SHARD = 5_000_000_000  # bytes of data in a file at most, as transformers writes it
Shapes = dict[str, tuple[int, ...]]

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2, "router_aux_loss_coef": 0.02,
}  # fmt: skip
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 40960, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
    "torch_dtype": "bfloat16", "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
DEEPSEEK_V3 = {  # in bf16, as fine-tunes are: what is in FP8 cannot be decomposed
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "first_k_dense_replace": 3, "moe_layer_freq": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "num_nextn_predict_layers": 0,
    "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def mixtral_8x7b(folder: Path) -> Path:
    """Mixtral-8x7B in bf16, 93 GB in 19 files, as an empty `folder` that takes no more than its headers."""
    return checkpoint(MIXTRAL_8X7B, folder)


def checkpoint(config: dict[str, Any], folder: Path) -> Path:
    """A model with this config.json in bf16, as an empty `folder` that takes no more than its headers."""
    family, known = Family.of(config), tensors_of(config)
    shapes = {EMBEDDING: known[EMBEDDING]}
    for i in range(family.num_layers):
        shapes |= {n: shape for n, shape in known.items() if n.startswith(family.prefix(i))}
        if i in family.moe_layers:
            shapes |= experts_of(family, i)
    shapes |= {n: shape for n, shape in known.items() if n not in shapes}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SMALL / name, folder / name)
    write(shapes, folder)
    return folder


def tensors_of(config: dict[str, Any]) -> Shapes:
    """The tensors of a model with this config.json but the routed experts, by their names on disk."""
    if (known := shapes_of(config)) is None:
        raise ValueError(f"a {config['model_type']} is not understood here; `moeflow families` says why")
    return {name: tuple(shape) for name, shape in known.items()}


def experts_of(family: Family, layer: int) -> Shapes:
    """The tensors of a layer's routed experts."""
    width, inner = family.size("hidden_size") or 0, family.expert_size or 0
    sides = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    named = (zip(family.matrices, family.expert(layer, e), strict=True) for e in range(family.num_experts))
    return {name: sides[matrix] for each in named for matrix, name in each}


def in_hub_cache(config: dict[str, Any], cache: Path, name: str) -> None:
    """The model in the hub's cache, as if it had been fetched as `name`: of what lies there plans read headers alone."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    checkpoint(config, repository / "snapshots" / ("0" * 40))


def write(shapes: Shapes, folder: Path) -> None:
    """Sparse safetensors files in bf16 with these tensors in this order, and their index."""
    files: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if sum(map(_bytes, files[-1].values())) + _bytes(shape) > SHARD:
            files.append({})
        files[-1][name] = shape
    index: dict[str, str] = {}
    for n, tensors in enumerate(files, 1):
        path, at = folder / f"model-{n:05d}-of-{len(files):05d}.safetensors", 0
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name, shape in tensors.items():
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at := at + _bytes(shape)]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at)  # a hole: it reads as zeros and takes no room
        index |= dict.fromkeys(tensors, path.name)
    total = sum(map(_bytes, shapes.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * prod(shape)
