"""Tiny checkpoints with multi-token-prediction layers, numbered as transformers looks for them."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from moeflow.arch import Arch
from moeflow.model.checkpoint import Tensors
from tests import tiny

_MLP = "model.layers.{layer}.mlp"
GLM4_MOE = Arch(
    model_type="glm4_moe",
    router=f"{_MLP}.gate.weight",
    router_bias=f"{_MLP}.gate.e_score_correction_bias",
    experts=tuple(f"{_MLP}.experts.{{expert}}.{m}_proj.weight" for m in ("gate", "up", "down")),
    shared=tuple(f"{_MLP}.shared_experts.{m}_proj.weight" for m in ("gate", "up", "down")),
    score="sigmoid",
    groups=True,
    group_score="top2",
    router_fp32=True,
)
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_routed_experts": 8, "n_shared_experts": 1}
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"num_hidden_layers": 61, "first_k_dense_replace": 59},
    "glm4_moe": {
        "num_hidden_layers": 46,
        "first_k_dense_replace": 44,
        "moe_intermediate_size": 24,
        "intermediate_size": 48,
        "head_dim": 8,
        "use_qk_norm": False,
        "routed_scaling_factor": 1.5,
    },
}
"""By family, a model of which transformers finds the prediction layer: it knows its number."""
_QWEN: dict[str, Any] = {
    "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "head_dim": 8, "intermediate_size": 48,
}  # fmt: skip
_TYPES = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": 8}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
APART: dict[str, dict[str, Any]] = {
    "qwen3_next": _QWEN | LINEAR | {
        "shared_expert_intermediate_size": 40, "layer_types": ["full_attention", "linear_attention", "full_attention"],
    },
    "mellum": _QWEN | _TYPES | {"num_mtp_layers": 1},
    "exaone_moe": _QWEN | _TYPES | {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 1},
}  # fmt: skip
"""By family, a model whose prediction layer is kept apart from the decoder layers, under names of its own."""
PUBLISHED = [(model["num_hidden_layers"], 1) for model in MODELS.values()]


def write(family: str, folder: Path, *, layers: int = 1, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint of `family` with prediction layers whose weights are random, too."""
    tiny.write(family, folder, seed=seed, **({**_MOE, **MODELS[family]} | changes))
    tensors = load_file(folder / "model.safetensors")
    number = 1 + max(int(n.split(".")[2]) for n in tensors if ".layers." in n)
    generator = torch.Generator().manual_seed(seed + 1)

    def like(tensor: Tensor) -> Tensor:
        return tensor[..., torch.randperm(tensor.shape[-1], generator=generator)].contiguous()

    for at in range(number, number + layers):
        prefix = f"model.layers.{at}."
        last = f"model.layers.{number - 1}."
        extra = {prefix + n.removeprefix(last): like(t) for n, t in tensors.items() if n.startswith(last)}
        width = tensors["model.norm.weight"].shape[0]
        for name in ("enorm", "hnorm", "shared_head.norm"):
            extra[f"{prefix}{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        extra[f"{prefix}eh_proj.weight"] = 0.2 * torch.randn(width, 2 * width, generator=generator)
        extra[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        extra[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        tensors |= extra
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, num_nextn_predict_layers=layers, **({"moeflow_arch": GLM4_MOE.to_json()} if family == "glm4_moe" else {}))
    return folder


def write_apart(family: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint of `family` with one prediction layer, which is kept apart."""
    tiny.write(family, folder, seed=seed, **(APART[family] | changes))
    put_apart(folder, "model.", 2, seed=seed)
    return folder


def put_apart(folder: Path, stem: str, last: int, *, seed: int = 0) -> None:
    """Add a prediction layer like decoder layer `last`; `stem`: how the names of the text model begin."""
    tensors = load_file(folder / "model.safetensors")
    generator, prefix = torch.Generator().manual_seed(seed + 1), f"{stem}layers.{last}."
    tensors = {n: t for n, t in tensors.items() if not n.startswith("mtp.")}
    extra = {
        "mtp.layers.0." + n.removeprefix(prefix): t[..., torch.randperm(t.shape[-1], generator=generator)].contiguous()
        for n, t in tensors.items()
        if n.startswith(prefix)
    }
    width = tensors[f"{stem}norm.weight"].shape[0]
    extra["mtp.fc.weight"] = 0.2 * torch.randn(width, 2 * width, generator=generator)
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        extra[f"mtp.{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})


def edit(folder: Path, **changes: Any) -> None:
    """Write these changes into config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Predictions:
    """A checkpoint in transformers, with its prediction layers."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        config = self.model.config
        own = config.model_type.startswith("moeflow_") or any(n.startswith("mtp.") for n in Tensors(folder))
        if own or (config.num_hidden_layers, config.num_mtp_layers) in PUBLISHED:
            self.mtp: Any = MtpModel.from_pretrained(self.model, device_map={"": torch.device("cpu")}).eval()
        else:  # transformers looks for them by the numbers that they have in the published models
            self.mtp = MtpModel(self.model, config.num_mtp_layers).eval()
            left = self.mtp.load_state_dict(_in_memory(Tensors(folder), config.num_hidden_layers), strict=False)
            assert not left.unexpected_keys and all(n.startswith(("embed_tokens", "shared_head")) for n in left.missing_keys)

    @torch.inference_mode()
    def states(self, ids_NL: Tensor) -> Tensor:
        """The hidden states behind the final norm, [N, L, D]."""
        states: Tensor = self.model(ids_NL, output_hidden_states=True).hidden_states[-1]
        return states

    @torch.inference_mode()
    def behind(self, states_NLD: Tensor, ids_NL: Tensor) -> list[Tensor]:
        """The states behind each prediction layer, one behind the other, of the states of a model."""
        cache = MtpCache(config=self.model.config.get_mtp_config())
        behind = []
        for at in range(len(self.mtp.layers)):
            positions = torch.arange(at + 1, ids_NL.shape[1])[None]
            states_NLD = self.mtp.forward_layer(at, states_NLD[:, :-1], positions, cache, input_ids=ids_NL[:, at + 1 :])
            behind.append(states_NLD)
        return behind

    @contextmanager
    def inputs(self) -> Iterator[list[Tensor]]:
        """The inputs [T, D] of the prediction layers' MoE blocks, as they run."""
        seen: list[Tensor] = []
        hooks = [
            layer.mtp_block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
            for layer in self.mtp.layers
        ]
        yield seen
        for hook in hooks:
            hook.remove()

    def mask(self, layer: int, keep: list[int]) -> None:
        """Let the router of a prediction layer, numbered from 0, choose among these experts only."""
        bias_E = self.mtp.layers[layer].mtp_block.mlp.gate.e_score_correction_bias
        for e in range(len(bias_E)):
            if e not in keep:
                bias_E[e] = -torch.inf


def _in_memory(tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The tensors of the prediction layers, from `number` on, by their names in transformers' memory."""
    states: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None or (at := int(match[1]) - number) < 0 or match[2].startswith(("embed_tokens.", "shared_head.head.")):
            continue
        inside = match[2].replace("shared_head.norm.", "post_norm.")
        if "mlp.experts." not in inside:
            around = inside.startswith(("enorm.", "hnorm.", "eh_proj.", "post_norm."))
            states[f"layers.{at}.{inside if around else 'mtp_block.' + inside}"] = tensor
        elif inside.endswith("experts.0.gate_proj.weight"):
            stem, _, _ = name.partition("0.gate_proj.weight")
            gate, up, down = (
                [tensors[f"{stem}{e}.{m}_proj.weight"] for e in range(sum(n.startswith(stem) for n in tensors) // 3)]
                for m in ("gate", "up", "down")
            )
            both = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
            here = f"layers.{at}.mtp_block.mlp.experts."
            states |= {f"{here}gate_up_proj": torch.stack(both), f"{here}down_proj": torch.stack(down)}
    return states
