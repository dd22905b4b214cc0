"""Every Mixture-of-Experts model type of the installed transformers, and whether moeflow works on it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from moeflow.arch import Config
from moeflow.model.structure.anatomy import Unknown
from moeflow.model.structure.building import one_line
from moeflow.model.structure.looking import Answer, look

ASKED: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "hunyuan_v1_moe": {"num_experts": 64, "moe_topk": 8, "head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "glm4v_moe_text": {
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [8, 12, 12],
        },
    },
    "step3p5": {"sliding_window": 512},
    "gemma4_text": {"num_experts": 128, "top_k_experts": 8, "enable_moe_block": True, "moe_intermediate_size": 704},
}
"""What published checkpoints say where a configuration's own defaults describe no model with experts."""
NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Row:
    """A model type, and how moeflow knows it: "structure", or "no" with the reason."""

    model_type: str
    by: str
    why: str = ""
    answer: Answer | None = None

    def to_json(self) -> dict[str, Any]:
        return {"type": self.model_type, "by": self.by} | ({"why": self.why} if self.why else {}) | self._about()

    def _about(self) -> dict[str, Any]:
        if self.answer is None:
            return {}
        arch, layout = self.answer.arch, self.answer.layout
        stacked = sorted({w for s in layout.stacked for w in ("transposed", "interleaved") if getattr(s, w)})
        words = ["stacked", *stacked] if layout.stacked else ["one by one"]
        words += ["biases"] if arch.expert_biases else []
        words += ["no gate"] if len(arch.experts) == 2 else []
        words += ["inside a multimodal model"] if layout.inside else []
        router = [arch.score, *(["bias for the choice"] if arch.router_bias else []), *(["offset"] if arch.router_offset else [])]
        router += ["groups"] if arch.groups else []
        router += ["weighs the input"] if arch.weighs_input else []
        shared = "gated" if arch.shared_gate else "yes" if arch.shared else ""
        return {"layout": ", ".join(words), "router": ", ".join(router), "shared": shared, "proven": self.answer.proven}


def types() -> list[str]:
    """The model types with routed experts that generate text, with images or without."""
    named = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return sorted(t for t in named if t in CONFIG_MAPPING and _has_experts(t))


def rows(asked: Sequence[str] = ()) -> Iterator[Row]:
    """A row for each of these model types, or for all, as each is looked at."""
    for model_type in asked or types():
        try:
            answer = look(default(model_type))
        except Unknown as why:
            yield Row(model_type, "no", str(why))
        except Exception as error:  # of any model's own code, or of ours: either way it does not work
            yield Row(model_type, "no", one_line(error))
        else:
            yield Row(model_type, "structure", "", answer)


def default(model_type: str) -> Config:
    """The configuration that transformers has for a model type when nothing is said, with experts. Raises Unknown."""
    if model_type not in CONFIG_MAPPING:
        raise Unknown(f"transformers has no model type {model_type!r}")
    try:
        config = CONFIG_MAPPING[model_type](**ASKED.get(model_type, {})).to_dict()
    except Exception as error:  # of any configuration's own checks
        raise Unknown(f"transformers has no configuration of it by default: {one_line(error)}") from None
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = text | ASKED.get(str(text.get("model_type")), {})
    return {k: v for k, v in config.items() if k != "architectures"}


def _has_experts(model_type: str) -> bool:
    try:
        config = default(model_type)
    except Unknown:
        return False
    below = [v for v in config.values() if isinstance(v, dict)]
    return any(key in each for each in (config, *below) for key in NAMES)
