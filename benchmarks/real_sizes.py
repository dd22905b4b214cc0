"""Checkpoints of real size that need no disk: true headers, sizes and configuration, and holes in the place of weights.

`plan` reads headers and configuration alone, so what it says of such a folder is what it says of the published model.
"""

import json
import shutil
import struct
from math import prod
from pathlib import Path

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


def mixtral_8x7b(folder: Path) -> Path:
    """Mixtral-8x7B in bf16, 93 GB in 19 files, as an empty `folder` that takes no more than its headers."""
    c = MIXTRAL_8X7B
    hidden, inner, vocabulary = (int(str(c[n])) for n in ("hidden_size", "intermediate_size", "vocab_size"))
    narrow = hidden // int(str(c["num_attention_heads"])) * int(str(c["num_key_value_heads"]))
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(int(str(c["num_hidden_layers"]))):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (hidden, hidden) for n in ("q", "o")}
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (narrow, hidden) for n in ("k", "v")}
        shapes[f"{layer}block_sparse_moe.gate.weight"] = (int(str(c["num_local_experts"])), hidden)
        for e in range(int(str(c["num_local_experts"]))):
            expert = f"{layer}block_sparse_moe.experts.{e}."
            shapes |= {f"{expert}w{n}.weight": (inner, hidden) for n in (1, 3)} | {f"{expert}w2.weight": (hidden, inner)}
        shapes |= {f"{layer}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(c, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SMALL / name, folder / name)
    write(shapes, folder)
    return folder


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
