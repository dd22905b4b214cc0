"""A small Mixtral that a graph trains itself, for demonstrations and tests, as a model like any other."""

from typing import Any

from moeflow.arch import Config, essential
from moeflow.methods.checkpoint.steps import layer, rest
from moeflow.methods.graph import Model
from moeflow.methods.pretrain.steps import TOKENIZER_FILES, WEIGHTS, table_of, train
from moeflow.model.spec import file_bytes, tensor_bytes
from moeflow.sources import Texts


def mixtral(
    texts: Texts,
    *,
    width: int = 128,
    ffn: int = 256,
    layers: int = 4,
    heads: int = 4,
    experts: int = 8,
    vocabulary: int = 1024,
    length: int = 128,
    batch: int = 16,
    steps: int = 300,
    rate: float = 3e-3,
    seed: int = 0,
) -> Model:
    """A Mixtral trained on `texts` for `steps` batches of `batch` sequences of `length` tokens, as a model like any other."""
    config: Config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "dtype": "float32", "vocab_size": vocabulary,
        "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2), "head_dim": width // heads, "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4 * length, "sliding_window": None, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": True,
        "router_aux_loss_coef": 0.01, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    sources = [e.source.group([f.name for f in e.source.files]) for e in texts.entries()]
    trained = train(*sources, config=config, length=length, batch=batch, steps=steps, rate=rate, seed=seed)
    tables: dict[int | None, dict[str, list[Any]]] = {}
    whole = table_of(config)
    at = file_bytes(whole) - sum(tensor_bytes(*t) for t in whole.values())
    for name, (dtype, shape) in whole.items():
        size = tensor_bytes(dtype, shape)
        i = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        tables.setdefault(i, {})[name] = [0, dtype, list(shape), at, at + size]
        at += size
    weights = trained.part(WEIGHTS)
    return Model(
        config=config,
        rest=rest(trained, (weights,), config=config, files=list(TOKENIZER_FILES), tensors=tables[None], note=""),
        texts=trained.part("tokenizer"),
        layers=tuple(layer((weights,), config=essential(config), layer=i, tensors=tables[i]) for i in range(layers)),
    )
