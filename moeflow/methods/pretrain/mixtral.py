"""The training loop of a small Mixtral. Shapes are suffixes: N sequences, L positions, T tokens."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from moeflow.arch import Config
from moeflow.methods.pretrain.steps import Pretraining
from moeflow.step import Context

SAVED_EVERY = 50
"""Optimizer steps between two saved states, from which an interrupted training continues."""


def train_mixtral(context: Context, files: list[Path], config: Config, how: Pretraining) -> None:
    """Train a tokenizer and a model, and save both into the step's folder. Raises ValueError if there is too little text."""
    steps, batch, length = how.steps, how.batch, how.length
    ids_T = _tokenized(context, [f.read_text(encoding="utf-8", errors="replace") for f in files], config)
    if len(ids_T) <= length:
        raise ValueError(f"the texts give {len(ids_T):,} tokens; a sequence needs {length + 1:,}")
    torch.manual_seed(how.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).train()
    model.config._experts_implementation = "eager"  # on a CPU twice as fast as the others, forward and backward
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.1 + 0.9 * (1 + math.cos(math.pi * s / steps)) / 2)
    )
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    losses: list[float] = []
    if (folder := context.resume()) is not None:
        state = torch.load(folder / "state.pt", weights_only=True)
        losses = state["losses"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
        context.note(f"goes on behind step {len(losses)}")
    for at in range(len(losses), steps):
        draw = torch.Generator().manual_seed(how.seed * 1_000_003 + at)
        starts = torch.randint(0, len(ids_T) - length, (batch,), generator=draw)
        ids_NL = torch.stack([ids_T[s : s + length] for s in starts])
        out = model(ids_NL, labels=ids_NL, output_router_logits=True, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(out.loss.item(), 4))
        context.progress((at + 1) * batch * length, steps * batch * length, "tokens")
        if (at + 1) % SAVED_EVERY == 0:
            folder = context.scratch / "state"
            folder.mkdir(exist_ok=True)
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"losses": losses}, folder / "state.pt")
            context.save(folder)
    model.config.use_cache = True
    model.eval().save_pretrained(context.out)
    (context.out / "training.json").write_text(json.dumps({"tokens": len(ids_T), "loss": losses}) + "\n")
    context.note(f"trained on {steps * batch * length:,} of {len(ids_T):,} tokens: loss {losses[0]:.2f} to {losses[-1]:.2f}")


def _tokenized(context: Context, texts: list[str], config: Config) -> Tensor:
    """Train and save a tokenizer. Returns the ids of all texts, each after the token that begins a text."""
    bpe = ByteLevelBPETokenizer()
    vocabulary, special = int(config["vocab_size"]), ["<s>", "</s>"]
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=special, show_progress=False, min_frequency=2)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(context.out)
    return torch.cat([torch.tensor([tokenizer.bos_token_id, *tokenizer(t, verbose=False)["input_ids"]]) for t in texts])
