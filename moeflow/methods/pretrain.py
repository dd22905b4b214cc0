"""Train a small Mixtral from nothing on some text, for demonstrations and tests: a model that has learned something.

Shapes are suffixes: N sequences, L positions.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from moeflow.arch import MIXTRAL, Config
from moeflow.methods.fetch import Model, layer, rest
from moeflow.model.spec import TensorTable, file_bytes, tensor_bytes
from moeflow.step import Artifact, Context, Spec, step

WEIGHTS = "model.safetensors"
SAVED_EVERY = 50
"""Optimizer steps between two partial states, from which an interrupted training goes on."""


def mixtral(
    texts: Any,
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
        "num_key_value_heads": max(1, heads // 2), "head_dim": width // heads, "num_local_experts": experts, "num_experts_per_tok": 2,
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
        rest=rest(trained, weights, config=config, files=list(TOKENIZER_FILES), tensors=tables[None], note=""),
        layers=tuple(layer(weights, config=config, layer=i, tensors=tables[i]) for i in range(layers)),
    )


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def table_of(config: Config) -> TensorTable:
    """The tensors of a Mixtral of this configuration under the hub's names, in the order in which `save` lays them out."""
    d, f, v, e = (int(config[k]) for k in ("hidden_size", "intermediate_size", "vocab_size", "num_local_experts"))
    q, kv = (int(config[k]) * int(config["head_dim"]) for k in ("num_attention_heads", "num_key_value_heads"))
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    for i in range(int(config["num_hidden_layers"])):
        prefix = MIXTRAL.prefix(i)
        attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        table |= {f"{prefix}self_attn.{n}.weight": shape for n, shape in attention.items()}
        table |= {f"{prefix}{n}.weight": (d,) for n in ("input_layernorm", "post_attention_layernorm")}
        table[MIXTRAL.router.format(layer=i)] = (e, d)
        for x in range(e):
            table |= dict(zip(MIXTRAL.expert(i, x), ((f, d), (f, d), (d, f)), strict=True))
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
    """A byte-level BPE and a Mixtral trained on the texts, with AdamW and a cosine schedule; goes on from its last partial state."""
    files = [text.file(name) for text in texts for name in text.names()]
    tokenizer = _tokenizer(files, config)
    tokenizer.save_pretrained(context.out)
    ids_T = torch.cat([_encoded(tokenizer, f) for f in files])
    if len(ids_T) <= length:
        raise ValueError(f"the texts give {len(ids_T):,} tokens; a sequence needs {length + 1:,}")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).train()
    model.config._experts_implementation = "grouped_mm"
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.1 + 0.9 * (1 + math.cos(math.pi * s / steps)) / 2)
    )
    first, losses = _resumed(context, model, optimizer, schedule)
    for at in range(first, steps):
        ids_NL = _batch(ids_T, length, batch, torch.Generator().manual_seed(seed * 1_000_003 + at))
        out = model(ids_NL, labels=ids_NL, output_router_logits=True, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(float(out.loss), 4))
        context.progress((at + 1) * batch * length, steps * batch * length, "tokens")
        if (at + 1) % SAVED_EVERY == 0:
            _save(context, model, optimizer, schedule, at + 1, losses)
    model.config.use_cache = True
    model.eval().save_pretrained(context.out)
    (context.out / "config.json").unlink()  # the configuration is a parameter, and the steps behind this one write it
    (context.out / "training.json").write_text(json.dumps({"tokens": len(ids_T), "loss": losses}) + "\n")
    context.note(f"trained on {steps * batch * length:,} of {len(ids_T):,} tokens: loss {losses[0]:.2f} to {losses[-1]:.2f}")


def _tokenizer(files: list[Path], config: Config) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    texts = (f.read_text(encoding="utf-8", errors="replace") for f in files)
    bpe.train_from_iterator(
        texts, vocab_size=int(config["vocab_size"]), special_tokens=["<s>", "</s>"], show_progress=False, min_frequency=2
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")


def _encoded(tokenizer: PreTrainedTokenizerFast, file: Path) -> Tensor:
    text = file.read_text(encoding="utf-8", errors="replace")
    return torch.tensor([tokenizer.bos_token_id, *tokenizer(text, verbose=False)["input_ids"]])


def _batch(ids_T: Tensor, length: int, batch: int, draw: torch.Generator) -> Tensor:
    starts = torch.randint(0, len(ids_T) - length, (batch,), generator=draw)
    return torch.stack([ids_T[s : s + length] for s in starts])


def _save(context: Context, model: Any, optimizer: Any, schedule: Any, at: int, losses: list[float]) -> None:
    folder = context.scratch / "state"
    folder.mkdir(exist_ok=True)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "at": at,
        "losses": losses,
    }
    torch.save(state, folder / "state.pt")
    context.save(folder)


def _resumed(context: Context, model: Any, optimizer: Any, schedule: Any) -> tuple[int, list[float]]:
    folder = context.resume()
    if folder is None:
        return 0, []
    state = torch.load(folder / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    context.note(f"goes on behind step {state['at']}")
    return int(state["at"]), list(state["losses"])
