"""Tiny random checkpoints of families of other kinds, in moeflow's normal form, each with its `Arch` in config.json.

The hub's own form lies beside, as transformers writes it, so that every test can ask transformers itself.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moeflow.arch import ARCH, Arch
from tests.tiny import COMMON, MLA

_MLP = "model.layers.{layer}.mlp"


def _matrices(stem: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{stem}.{name}_proj.weight" for name in names or ("gate", "up", "down"))


def _arch(model_type: str, block: str = _MLP, router: str = "gate.weight", **fields: Any) -> Arch:
    names = {"router": f"{block}.{router}", "experts": _matrices(f"{block}.experts.{{expert}}")}
    return Arch(model_type=model_type, **{**names, "block": block.rpartition(".")[2], **fields})


_SIGMOID: dict[str, Any] = dict(score="sigmoid", group_score="top2", groups=True, router_fp32=True)
_BIAS = ".gate.e_score_correction_bias"
_EXPERTS = dict(intermediate_size=48, moe_intermediate_size=24, num_experts_per_tok=3)
_FF = "model.layers.{layer}.feed_forward"
_MIXER = "model.layers.{layer}.mixer"

FAMILIES: dict[str, tuple[Arch, dict[str, Any]]] = {
    "glm4_moe": (
        _arch("glm4_moe", router_bias=_MLP + _BIAS, shared=_matrices(_MLP + ".shared_experts"), **_SIGMOID),
        dict(
            _EXPERTS, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1, routed_scaling_factor=1.5, n_group=1,
            topk_group=1, head_dim=8, use_qk_norm=True,
        ),
    ),
    "qwen3_next": (
        _arch(
            "qwen3_next", shared=_matrices(_MLP + ".shared_expert"), shared_gate=_MLP + ".shared_expert_gate.weight",
        ),
        dict(
            _EXPERTS, num_experts=8, shared_expert_intermediate_size=16, head_dim=8, norm_topk_prob=True, decoder_sparse_step=1,
            mlp_only_layers=[], layer_types=["linear_attention", "full_attention", "linear_attention"], linear_num_key_heads=2,
            linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        ),
    ),
    "ernie4_5_moe": (
        _arch(
            "ernie4_5_moe", router_bias=_MLP + ".gate.moe_statics.e_score_correction_bias", normalize="always", router_fp32=True,
            shared=_matrices(_MLP + ".shared_experts"), experts_key="moe_num_experts", top_k_key="moe_k", moe=(1, 2),
        ),
        dict(
            intermediate_size=48, moe_intermediate_size=24, moe_num_experts=8, moe_k=3, moe_num_shared_experts=1,
            moe_layer_start_index=1, moe_layer_end_index=2,
        ),
    ),
    "gpt_oss": (
        _arch(
            "gpt_oss", router="router.weight", block_router="router", router_offset=_MLP + ".router.bias", normalize="always",
            expert_biases=tuple(n.replace(".weight", ".bias") for n in _matrices(_MLP + ".experts.{expert}")),
            activation="clamped_swiglu", expert_width=24,
        ),
        dict(
            intermediate_size=24, num_local_experts=8, num_experts_per_tok=3, head_dim=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=6,
        ),
    ),
    "granitemoe": (
        _arch(
            "granitemoe", "model.layers.{layer}.block_sparse_moe", "router.weight", block_router="router", normalize="always",
        ),
        dict(
            intermediate_size=24, num_local_experts=8, num_experts_per_tok=3, embedding_multiplier=3.0, logits_scaling=2.0,
            residual_multiplier=0.5, attention_multiplier=0.3,
        ),
    ),
    "nemotron_h": (
        _arch(
            "nemotron_h", _MIXER, router_bias=_MIXER + _BIAS, experts=_matrices(_MIXER + ".experts.{expert}", "up", "down"),
            shared=_matrices(_MIXER + ".shared_experts", "up", "down"), norm="norm", attention="mixer",
            moe=(1, 3), rest=(("model.embed_tokens.", "model.embeddings."), ("model.norm.", "model.norm_f.")), **_SIGMOID,
        ),
        dict(
            _EXPERTS, n_routed_experts=8, n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.5,
            moe_shared_expert_intermediate_size=40, layers_block_type=["mamba", "moe", "attention", "moe"], num_hidden_layers=4,
            head_dim=8, ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, conv_kernel=4, chunk_size=8,
        ),
    ),
    "llama4_text": (
        _arch(
            "llama4_text", _FF, "router.weight", block_router="router", score="sigmoid", weighs_input=True, normalize="never",
            shared=_matrices(_FF + ".shared_expert"), moe=(0, 2), expert_width=24,
        ),
        dict(
            intermediate_size=24, intermediate_size_mlp=40, num_local_experts=8, num_experts_per_tok=1, head_dim=8,
            moe_layers=[0, 2], attention_chunk_size=8,
        ),
    ),
    "glm_moe_dsa": (
        _arch(
            "glm_moe_dsa", router_bias=_MLP + _BIAS, shared=_matrices(_MLP + ".shared_experts"), moe=(1, 2),
            handed_on="index_topk", **_SIGMOID,
        ),
        dict(
            _EXPERTS, n_routed_experts=8, n_shared_experts=1, mlp_layer_types=["dense", "sparse", "sparse"], n_group=1,
            topk_group=1, index_topk=4, index_head_dim=16, index_n_heads=2, indexer_types=["full", "shared", "shared"], **MLA,
        ),
    ),
    "mimo_v2_flash": (
        _arch("mimo_v2_flash", router_bias=_MLP + _BIAS, moe=(1, 2), **_SIGMOID),
        dict(
            _EXPERTS, n_routed_experts=8, mlp_layer_types=["dense", "sparse", "sparse"], n_group=1, topk_group=1, head_dim=8,
            v_head_dim=8, layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=6,
        ),
    ),
    "lfm2_moe": (
        _arch(
            "lfm2_moe", _FF, router_bias=_FF + ".expert_bias", score="sigmoid", moe=(1, 2), norm="ffn_norm",
            experts=_matrices(_FF + ".experts.{expert}"), rest=(("model.norm.", "model.embedding_norm."),),
        ),
        dict(
            _EXPERTS, num_experts=8, num_dense_layers=1, layer_types=["conv", "full_attention", "conv"], use_expert_bias=True,
            norm_topk_prob=True,
        ),
    ),
}  # fmt: skip


def hub(folder: Path) -> Path:
    """The folder with the same checkpoint as transformers writes it."""
    return folder.with_name(f"{folder.name}-hub")


def write(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A checkpoint of `family` in `folder`, and the same in the hub's form beside it."""
    torch.manual_seed(0)
    arch, config = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**(COMMON | config | changes)))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            large = 1.0 if ".gate.weight" in name or ".router.weight" in name else 0.2
            if tensor.dim() > 1 and "embed" not in name and "conv" not in name and "correction" not in name:
                tensor.copy_(torch.randn_like(tensor) * large)
            elif "bias" in name or "sinks" in name:
                tensor.copy_(torch.randn_like(tensor) * 0.1)
    model.to(dtype).save_pretrained(hub(folder))
    model = load(folder, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(normal(model, arch)), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((hub(folder) / "config.json").read_text()) | {ARCH: arch.to_json()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, **options: Any) -> Any:
    """The checkpoint in the hub's form beside the one in `folder`, by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(hub(folder), **options).eval()


def normal(model: nn.Module, arch: Arch) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model of transformers in the normal form."""
    for name, tensor in model.state_dict().items():
        head, inside, last = name.partition(f".{arch.block}.experts.")
        renamed = next((disk + name.removeprefix(memory) for disk, memory in arch.rest if name.startswith(memory)), name)
        if not inside:
            yield renamed, tensor.clone()
            continue
        module: Any = model.get_submodule(f"{head}.{arch.block}.experts")
        transposed = getattr(module, "is_transposed", arch.model_type == "llama4_text") and tensor.dim() == 3
        templates = arch.expert_biases if "bias" in last else arch.experts
        for expert, matrix in enumerate(tensor.mT if transposed else tensor):
            both = last.startswith("gate_up")
            halves = (matrix[::2], matrix[1::2]) if arch.model_type == "gpt_oss" else matrix.chunk(2)
            parts = zip(templates[:2], halves, strict=True) if both else [(templates[-1 if "down" in last else 0], matrix)]
            for template, part in parts:
                yield template.format(layer=int(head.split(".")[2]), expert=expert), part.contiguous().clone()
