"""Train a small Mixtral from scratch on some text, for demonstrations and tests that need a model that has learned something."""

from dataclasses import dataclass
from typing import Any

from moeflow.arch import EMBEDDING, FINAL_NORM, Config, Family
from moeflow.model.spec import TensorTable, file_bytes
from moeflow.step import Artifact, Context, Spec, step

WEIGHTS = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Shape:
    """The size of a small Mixtral."""

    width: int = 128
    """The width of the hidden states."""
    ffn: int = 256
    """The inner width of an expert."""
    layers: int = 4
    """Decoder layers."""
    heads: int = 4
    """Attention heads; there are half as many key-value heads."""
    experts: int = 8
    """Experts per layer; two of them compute each token."""
    vocabulary: int = 1024
    """Tokens of the vocabulary."""

    def config(self, length: int) -> Config:
        """The configuration of a model that is trained on sequences of this length."""
        return {
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "dtype": "float32", "vocab_size": self.vocabulary,
            "hidden_size": self.width, "intermediate_size": self.ffn, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": max(1, self.heads // 2),
            "head_dim": self.width // self.heads, "num_local_experts": self.experts, "num_experts_per_tok": 2,
            "max_position_embeddings": 4 * length, "sliding_window": None, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": True,
            "router_aux_loss_coef": 0.01, "bos_token_id": 0, "eos_token_id": 1,
        }  # fmt: skip


@dataclass(frozen=True)
class Pretraining:
    """How a small Mixtral is trained. Raises ValueError for invalid options."""

    steps: int = 300
    """Optimizer steps."""
    batch: int = 16
    """Sequences of one step."""
    length: int = 128
    """Tokens of a sequence."""
    rate: float = 3e-3
    """The highest learning rate."""
    seed: int = 0
    """The seed of the weights and the batches."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not 0 < self.rate < 1:
            raise ValueError(
                f"steps={self.steps}, batch={self.batch}, rate={self.rate}: there must be at least one step and sequence, "
                "and 0 < rate < 1"
            )


def table_of(config: Config) -> TensorTable:
    """The tensors of a Mixtral of this configuration, by the hub's names, in the order of its file."""
    d, f, v, e = (int(config[k]) for k in ("hidden_size", "intermediate_size", "vocab_size", "num_local_experts"))
    q, kv = (int(config[k]) * int(config["head_dim"]) for k in ("num_attention_heads", "num_key_value_heads"))
    family = Family.of(config)
    table: dict[str, tuple[int, ...]] = {EMBEDDING: (v, d), FINAL_NORM: (d,)}
    for i in range(int(config["num_hidden_layers"])):
        prefix = family.prefix(i)
        attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        table |= {f"{prefix}{family.arch.attention}.{n}.weight": shape for n, shape in attention.items()}
        table |= {f"{prefix}{n}.weight": (d,) for n in ("input_layernorm", family.arch.norm)}
        table[family.router(i)] = (e, d)
        for x in range(e):
            table |= dict(zip(family.expert(i, x), ((f, d), (f, d), (d, f)), strict=True))
    return {name: ("F32", table[name]) for name in sorted(table)}


def _train_spec(texts: tuple[Any, ...], *, config: Config, how: Pretraining) -> Spec:
    size = file_bytes(table_of(config))
    text = sum(sum(t["files"].values()) for t in texts)
    output = {"files": dict.fromkeys(TOKENIZER_FILES, 40 * int(config["vocab_size"])) | {WEIGHTS: size}}
    done = 6 * size // 4 * how.steps * how.batch * how.length  # of a forward and a backward pass, of all experts at most
    return Spec(
        output, reads=text, writes=size + 60 * int(config["vocab_size"]), operations={"float32": done}, memory=8 * size + 4 * text
    )


@step("pretrain.mixtral", version=1, spec=_train_spec, cpus=2)
def train(context: Context, texts: tuple[Artifact, ...], *, config: Config, how: Pretraining) -> None:
    """Train a byte-level BPE tokenizer, and a Mixtral with AdamW, on the texts; an interrupted training continues."""
    from moeflow.methods.pretrain.mixtral import train_mixtral

    train_mixtral(context, [text.file(name) for text in texts for name in text.names()], config, how)
    (context.out / "config.json").unlink()  # the configuration is a parameter, and later steps write it
