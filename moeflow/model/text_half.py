"""The causal language model of a configuration: transformers' own class or, where it has none, its text model with a head.

Several multimodal models have a text model without a head in transformers, since their head is the whole model's.
Shapes are suffixes: N sequences, L positions, D model width, V vocabulary.
"""

from dataclasses import fields
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_MAPPING, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

LIKE_THE_BODY = (
    "_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend", "_no_split_modules",
    "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_keys_to_ignore_on_load_unexpected",
    "supports_gradient_checkpointing",
)  # fmt: skip
"""What transformers asks the class of a model, and the class of its text model answers."""


def language_model(config: PreTrainedConfig, **options: Any) -> Any:
    """A model with this configuration, made where torch makes tensors now (`torch.device`). `options`: as of `from_config`."""
    return language_class(type(config))._from_config(config, **options)


def language_class(config: Any) -> Any:
    """The class of the causal language models that have configurations of this class."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[config] if config in MODEL_FOR_CAUSAL_LM_MAPPING else _with_head(config)


@cache
def _with_head(config: Any) -> Any:
    body: Any = MODEL_MAPPING[config] if config in MODEL_MAPPING else _body(config)
    like = {name: getattr(body, name) for name in LIKE_THE_BODY if hasattr(body, name)}
    own = {"__module__": __name__, "config_class": config, "body": body}
    return type(f"{body.__name__}WithHead", (TextHalf,), like | own)


def _body(config: Any) -> Any:
    """The text model that has configurations of this class, where transformers names it nowhere. Raises ValueError."""
    module = import_module(config.__module__.replace(".configuration_", ".modeling_"))
    for name, kind in vars(module).items():
        if name.endswith("TextModel") and getattr(kind, "config_class", None) is config:
            return kind
    raise ValueError(
        f"transformers has no text model with a {config.__name__}, which is not supported; `moeflow families` lists what is"
    )


class TextHalf(PreTrainedModel, GenerationMixin):
    """A text model of transformers, of the class `body`, and a head."""

    body: Any
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        can: bool = cls.body._can_set_experts_implementation()  # transformers looks for it in the source of a model's own module
        return can

    def _init_weights(self, module: nn.Module) -> None:
        self.model._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        embedding: nn.Module = self.model.get_input_embeddings()
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **options: Any) -> Any:
        out = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, **options)
        logits_NLV = self.lm_head(out.last_hidden_state)
        names = {field.name for field in fields(CausalLMOutputWithPast)}
        return CausalLMOutputWithPast(logits=logits_NLV, **{k: v for k, v in out.items() if k in names})
