"""Tiny random checkpoints whose experts lie in stacks, or whose text model lies in a multimodal one, written by transformers.

Each has what `Found` says of it, by hand: E experts of width F and a model of width D, here 8, 24 and 32.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeflow.arch import Arch, Layout, Stacked
from moeflow.arch.found import Found
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.graph import Model
from moeflow.methods.records import Choice, LayerLoss
from moeflow.methods.rewrite import pruned
from moeflow.sources import pin
from moeflow.step import Context, Spec, step
from tests import tiny

transformers_: Any = transformers  # its classes are typed more narrowly than they take

COMMON: dict[str, Any] = tiny.COMMON | {"num_hidden_layers": 2}
MOE = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 8}
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "in_channels": 3, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 16,
}  # fmt: skip
IMAGE = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


def arch(model_type: str, moe: str, router: str, **more: Any) -> Arch:
    """The family of a model whose MoE block is called `moe` in a decoder layer."""
    stem = f"model.layers.{{layer}}.{moe}"
    matrices = tuple(f"{stem}.experts.{{expert}}.{m}.weight" for m in (GATE, UP, DOWN))
    fields: dict[str, Any] = {
        "router": f"{stem}.{router}.weight",
        "experts": matrices,
        "block": moe,
        "moe": (0, 1),
    }
    return Arch(model_type=model_type, **(fields | more))


def stacks(prefix: str, here: Arch, names: Sequence[str] = ("gate_up_proj", "down_proj"), **how: bool) -> tuple[Stacked, Stacked]:
    """The stacks of gate and up, and of down, that lie below `prefix`."""
    return (
        Stacked(name=f"{prefix}.{names[0]}", parts=here.experts[:2], **how),
        Stacked(name=f"{prefix}.{names[1]}", parts=here.experts[2:], transposed=how.get("transposed", False)),
    )


@dataclass(frozen=True)
class Kind:
    """One kind of checkpoint: how transformers makes it, and what is found of it."""

    config: Callable[[], Any]
    model: str  # the class of transformers
    found: Found
    counts: tuple[str, ...] = ("num_experts",)  # the keys of the text model's configuration that say how many experts there are
    saved: dict[str, Any] = field(default_factory=dict)  # options of save_pretrained


def _qwen3_5() -> Any:
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    layers = {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 40}
    text = COMMON | MOE | layers | linear
    return transformers_.Qwen3_5MoeConfig(text_config=text, vision_config=VISION, **IMAGE)


def _qwen3_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = COMMON | MOE | {"intermediate_size": 48, "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_parameters": rope}
    return transformers_.Qwen3VLMoeConfig(text_config=text, vision_config=VISION | {"deepstack_visual_indexes": [0]}, **IMAGE)


def _llama4() -> Any:
    text = COMMON | {"intermediate_size": 24, "intermediate_size_mlp": 48, "num_local_experts": 8, "num_experts_per_tok": 1}
    text |= {"head_dim": 8, "interleave_moe_layer_step": 1}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 16}
    vision |= {"patch_size": 8, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    image = {"boi_token_index": 88, "eoi_token_index": 89, "image_token_index": 90}
    return transformers_.Llama4Config(text_config=text, vision_config=vision, **image)


def _gpt_oss() -> Any:
    made = COMMON | {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 16}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return transformers_.GptOssConfig(**made, rope_parameters=rope)


def _granite() -> Any:
    return transformers_.GraniteMoeConfig(**COMMON, intermediate_size=24, num_local_experts=8, num_experts_per_tok=3)


_QWEN3_5 = arch(
    "qwen3_5_moe_text", "mlp", "gate", normalize="always", shared_gate="model.layers.{layer}.mlp.shared_expert_gate.weight",
    shared=tuple(f"model.layers.{{layer}}.mlp.shared_expert.{m}.weight" for m in (GATE, UP, DOWN)),
)  # fmt: skip
_QWEN3_VL = arch("qwen3_vl_moe_text", "mlp", "gate", normalize="always")
_LLAMA4 = arch(
    "llama4_text", "feed_forward", "router", weighs_input=True, score="sigmoid",
    shared=tuple(f"model.layers.{{layer}}.feed_forward.shared_expert.{m}.weight" for m in (GATE, UP, DOWN)),
)  # fmt: skip
_EXPERT = "model.layers.{layer}.mlp.experts"
_GPT_OSS = arch(
    "gpt_oss", "mlp", "router", normalize="always", router_offset="model.layers.{layer}.mlp.router.bias",
    expert_biases=tuple(f"{_EXPERT}.{{expert}}.{m}.bias" for m in (GATE, UP, DOWN)),
)  # fmt: skip
_GRANITE = arch(
    "granitemoe", "block_sparse_moe", "router.layer", normalize="always",
    memory=(("block_sparse_moe.router.layer.", "block_sparse_moe.router."),),
)  # fmt: skip
_WRAPPED = "model.language_model.layers.{layer}.mlp.experts"
_QWEN_LAYOUT: dict[str, Any] = {
    "renamed": (("model.language_model.", "model."),), "beside": ("model.visual.",), "inside": ("text_config",),
}  # fmt: skip
_LLAMA4_LAYOUT = Layout(
    renamed=(("language_model.", ""),),
    stacked=stacks("language_model.model.layers.{layer}.feed_forward.experts", _LLAMA4, transposed=True),
    beside=("vision_model.", "multi_modal_projector."),
    inside=("text_config",),
)
_GPT_OSS_LAYOUT = Layout(
    stacked=(
        *stacks(_EXPERT, _GPT_OSS, transposed=True, interleaved=True),
        Stacked(name=f"{_EXPERT}.gate_up_proj_bias", parts=_GPT_OSS.expert_biases[:2], interleaved=True),
        Stacked(name=f"{_EXPERT}.down_proj_bias", parts=_GPT_OSS.expert_biases[2:]),
    )
)
_GRANITE_LAYOUT = Layout(
    stacked=stacks("model.layers.{layer}.block_sparse_moe", _GRANITE, ("input_linear.weight", "output_linear.weight"))
)
_WRAPPER = "Qwen3_5MoeForConditionalGeneration"
_QWEN3_5_LAYOUT = Layout(stacked=stacks(_WRAPPED, _QWEN3_5), per_expert=True, **_QWEN_LAYOUT)

KINDS = {
    "qwen3_5_moe": Kind(_qwen3_5, _WRAPPER, Found(_QWEN3_5, _QWEN3_5_LAYOUT)),
    "qwen3_5_moe in stacks": Kind(_qwen3_5, _WRAPPER, Found(_QWEN3_5, _QWEN3_5_LAYOUT), saved={"save_original_format": False}),
    "qwen3_vl_moe": Kind(
        _qwen3_vl,
        "Qwen3VLMoeForConditionalGeneration",
        Found(_QWEN3_VL, Layout(stacked=stacks(_WRAPPED, _QWEN3_VL, transposed=True), **_QWEN_LAYOUT)),
    ),
    "llama4": Kind(_llama4, "Llama4ForConditionalGeneration", Found(_LLAMA4, _LLAMA4_LAYOUT), counts=("num_local_experts",)),
    "gpt_oss": Kind(_gpt_oss, "GptOssForCausalLM", Found(_GPT_OSS, _GPT_OSS_LAYOUT), counts=("num_local_experts",)),
    "granitemoe": Kind(_granite, "GraniteMoeForCausalLM", Found(_GRANITE, _GRANITE_LAYOUT), counts=("num_local_experts",)),
}
WRAPPERS = tuple(name for name, kind in KINDS.items() if kind.found.layout.inside)


def made(kind: Kind, config: Any = None) -> Any:
    """A model of this kind, random, whose routers really choose."""
    torch.manual_seed(0)
    config = kind.config() if config is None else config
    config._experts_implementation = "eager"
    model = getattr(transformers_, kind.model)(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            routes = name.endswith((".gate.weight", "router.weight"))
            tensor.copy_(torch.randn_like(tensor) * (1.0 if routes else 0.2) + (tensor.dim() == 1) * 0.5)
    return model


def write(name: str, folder: Path) -> Path:
    made(KINDS[name]).save_pretrained(folder, **KINDS[name].saved)
    return folder


def model_in(folder: Path, found: Found, **options: Any) -> Model:
    return checkpoint.pinned(pin(str(folder), kind="model"), found=found, **options)


def _chosen_spec(*, layer: int, experts: int, keep: list[int]) -> Spec:
    return Spec({"layer": layer, "keep": len(keep), "bytes": 0})


@step("tests.chosen", version=1, spec=_chosen_spec)
def chosen(context: Context, *, layer: int, experts: int, keep: list[int]) -> None:
    """A decision as a search leaves it, of whoever wrote the test."""
    Choice(layer, experts, tuple(keep), "by hand", LayerLoss("frobenius", 0.0, 0.0, 0), None, {}).write(context.out)


def pruned_to(model: Model, keep: Mapping[int, Sequence[int]]) -> Model:
    """The model with these experts of each layer."""
    experts = {i: model.layer(i).spec.output.experts for i in keep}
    return pruned(model, {i: chosen(layer=i, experts=experts[i], keep=list(k)) for i, k in keep.items()})


def sliced(name: str, keep: Mapping[int, Sequence[int]]) -> Any:
    """The model that `write` writes with only these experts, of one number in all layers: fused tensors and routers are sliced."""
    kind = KINDS[name]
    whole, config = made(kind), kind.config()
    text = config.get_text_config()
    for key in kind.counts:
        setattr(text, key, len(keep[0]))
    small = made(kind, config)
    state: dict[str, Tensor] = {}
    for tensor, shape in small.state_dict().items():
        old = whole.state_dict()[tensor]
        layer = int(tensor.split("layers.")[1].split(".")[0]) if "layers." in tensor and "vis" not in tensor else 0
        state[tensor] = old if old.shape == shape.shape else old[keep[layer]]
    small.load_state_dict(state)
    return small


def raw(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of a checkpoint in one file."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
