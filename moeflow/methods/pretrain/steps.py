"""Train a small Mixtral from nothing on some text, for demonstrations and tests: a model that has learned something."""

from typing import Any

from moeflow.arch import MIXTRAL, Config, Family
from moeflow.model.spec import TensorTable, file_bytes
from moeflow.step import Artifact, Context, Spec, step

WEIGHTS = "model.safetensors"


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def table_of(config: Config) -> TensorTable:
    """The tensors of a Mixtral of this configuration under the hub's names, in the order in which `save` lays them out."""
    d, f, v, e = (int(config[k]) for k in ("hidden_size", "intermediate_size", "vocab_size", "num_local_experts"))
    q, kv = (int(config[k]) * int(config["head_dim"]) for k in ("num_attention_heads", "num_key_value_heads"))
    family = Family(MIXTRAL, config)
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    for i in range(int(config["num_hidden_layers"])):
        prefix = family.prefix(i)
        attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        table |= {f"{prefix}self_attn.{n}.weight": shape for n, shape in attention.items()}
        table |= {f"{prefix}{n}.weight": (d,) for n in ("input_layernorm", "post_attention_layernorm")}
        table[family.router(i)] = (e, d)
        for x in range(e):
            table |= dict(zip(family.expert(i, x), ((f, d), (f, d), (d, f)), strict=True))
    return {name: ("F32", table[name]) for name in sorted(table)}


def _train_spec(*texts: Any, config: Config, length: int, batch: int, steps: int, rate: float, seed: int) -> Spec:
    if steps < 1 or batch < 1 or not 0 < rate < 1:
        raise ValueError(
            f"steps={steps}, batch={batch}, rate={rate}: there must be at least one step and sequence, and 0 < rate < 1"
        )
    size = file_bytes(table_of(config))
    text = sum(sum(t["files"].values()) for t in texts)
    output = {"files": dict.fromkeys(TOKENIZER_FILES, 40 * int(config["vocab_size"])) | {WEIGHTS: size}}
    return Spec(output, reads=text, writes=size + 60 * int(config["vocab_size"]), memory=8 * size + 4 * text)


@step("pretrain.mixtral", version=1, spec=_train_spec, cpus=2)
def train(context: Context, *texts: Artifact, config: Config, length: int, batch: int, steps: int, rate: float, seed: int) -> None:
    """A byte-level BPE and a Mixtral trained on the texts with AdamW; goes on from the last partial state."""

    from moeflow.methods.pretrain.mixtral import train_mixtral

    files = [text.file(name) for text in texts for name in text.names()]
    train_mixtral(context, files, config, length=length, batch=batch, steps=steps, rate=rate, seed=seed)
    (context.out / "config.json").unlink()  # the configuration is a parameter, and the steps behind this one write it
