"""Two more trained models for the tables, so that no claim rests on one: many small experts, and shared experts behind latent
attention.

Trained from scratch on prose, mathematics and code, a third each, as the Mixtral in ../shared/models was: on the texts in
../shared/data and the standard library's sources. Each takes one to two hours of a core, once: the step is kept in the store that
MOEFLOW_BENCH_STORE names.

    MOEFLOW_BENCH_STORE=FOLDER python -m benchmarks.models
"""

import json
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeflow.arch import Config
from moeflow.methods.pretrain.steps import Pretraining
from moeflow.run import in_process
from moeflow.sources import Texts
from moeflow.step import Artifact, Context, Spec, step
from moeflow.store import Store

SHARED = Path(__file__).parents[2] / "shared"
PROSE = ("wikitext2_validation.jsonl#text", "lima.jsonl#instruction+response", "shakespeare.jsonl#text")
MATHEMATICS = ("gsm8k_train.jsonl#question+answer", "metamathqa_part.jsonl#query+response")
CODE = "python:stdlib"
EACH = 5_000_000
"""Characters of each kind of text, at most."""

LENGTH = 256
COMMON: Config = {
    "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "hidden_act": "silu",
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
    "dtype": "float32", "initializer_range": 0.02,
}  # fmt: skip
CONFIGS: Mapping[str, Config] = {
    "qwen2-moe": COMMON | {
        "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "num_key_value_heads": 2, "intermediate_size": 512,
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False, "router_aux_loss_coef": 0.01,
    },
    "deepseek-v2": COMMON | {
        "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "num_key_value_heads": 4,
        "intermediate_size": 768, "moe_intermediate_size": 128, "n_routed_experts": 32, "n_shared_experts": 1,
        "num_experts_per_tok": 4, "first_k_dense_replace": 1, "kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 48,
        "qk_rope_head_dim": 16, "v_head_dim": 64, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
        "norm_topk_prob": False, "routed_scaling_factor": 1.0, "aux_loss_alpha": 0.01,
    },
}  # fmt: skip
"""64 experts of which 8 compute a token, beside a gated shared one; 32 of which 4 do, beside a shared one, behind a dense layer."""
HOW = Pretraining(steps=600, batch=8, length=LENGTH, rate=2e-3)


def trained(name: str, store: Store, how: Pretraining = HOW, texts: str = "") -> Path:
    """A folder beside the store with the trained model, in bfloat16; trains it if the store has none."""
    given = Texts(texts or ",".join([*(f"{SHARED}/data/{n}" for n in (*PROSE, *MATHEMATICS)), CODE]))
    sources = tuple(e.source.group([f.name for f in e.source.files]) for e in given.entries())
    columns = [[*e.columns] for e in given.entries()]
    model = train(sources, columns=columns, config=dict(CONFIGS[name]), how=how, each=EACH)
    folder = Path(os.environ["MOEFLOW_BENCH_STORE"]).with_name("trained") / model.key
    if not folder.is_dir():
        in_process.run([model], store)
        store.fetch(model.key, folder)
    return folder


def _spec(texts: tuple[Any, ...], *, columns: list[list[str]], config: Config, how: Pretraining, each: int) -> Spec:
    size = 60 << 20
    return Spec({}, reads=sum(sum(t["files"].values()) for t in texts), writes=size, memory=40 * size)


@step("benchmarks.trained", version=1, spec=_spec, cpus=1)
def train(
    context: Context, texts: tuple[Artifact, ...], *, columns: list[list[str]], config: Config, how: Pretraining, each: int
) -> None:
    """Train a tokenizer and a model of this configuration; `each` characters of prose, of mathematics and of code at most."""
    import torch
    from transformers import AutoModelForCausalLM

    from moeflow.methods.pretrain.mixtral import train_mixtral

    kinds: dict[str, list[str]] = {}
    for artifact, of in zip(texts, columns, strict=True):
        kind = "code" if not of else "mathematics" if {"question", "query"} & {*of} else "prose"
        for file in map(artifact.file, artifact.names()):
            text = file.read_text(encoding="utf-8", errors="replace")
            rows = [text] if not of else ["\n".join(map(json.loads(r).get, of)) for r in text.strip().split("\n")]
            kinds.setdefault(kind, []).extend(rows)
    files = []
    for kind, rows in kinds.items():
        random.Random(how.seed).shuffle(rows)
        files.append(context.scratch / f"{kind}.txt")
        files[-1].write_text("\n\n".join(rows)[:each])
    train_mixtral(context, files, config, how)
    AutoModelForCausalLM.from_pretrained(context.out, dtype=torch.bfloat16).save_pretrained(context.out)


def main() -> None:
    store = Store.open(os.environ["MOEFLOW_BENCH_STORE"])
    for name in sys.argv[1:] or CONFIGS:
        print(name, trained(name, store), flush=True)


if __name__ == "__main__":
    main()
