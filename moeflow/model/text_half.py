"""The causal language model of a configuration: transformers' own class or, where it has none, its text model with a head.

Several multimodal models have a text model without a head in transformers, since their head is the whole model's.
Shapes are suffixes: N sequences, L positions, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING


def language_model(config: PreTrainedConfig, **options: Any) -> Any:
    """A model with this configuration, made where torch makes tensors now (`torch.device`). `options`: as of `from_config`."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM.from_config(config, **options)
    body = AutoModel.from_config(config, **options)
    return TextHalf(body, options.get("dtype") or torch.get_default_dtype())


class TextHalf(PreTrainedModel):
    """A text model of transformers and a head."""

    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, body: Any, dtype: torch.dtype) -> None:
        for name in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend"):
            setattr(type(self), name, getattr(body, name, False))
        super().__init__(body.config)
        self.model = body
        self.lm_head = nn.Linear(body.config.hidden_size, body.config.vocab_size, bias=False, dtype=dtype)
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for it in the source of a model's own module

    def _init_weights(self, module: nn.Module) -> None:
        self.model._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        embedding: nn.Module = self.model.get_input_embeddings()
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **options: Any) -> CausalLMOutput:
        hidden_NLD = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds, **options).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden_NLD))
