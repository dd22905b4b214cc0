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
    tokenizer = _tokenizer(files, config)
    tokenizer.save_pretrained(context.out)
    ids_T = torch.cat([_encoded(tokenizer, f) for f in files])
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
    first, losses = _resumed(context, model, optimizer, schedule)
    for at in range(first, steps):
        ids_NL = _batch(ids_T, length, batch, torch.Generator().manual_seed(how.seed * 1_000_003 + at))
        out = model(ids_NL, labels=ids_NL, output_router_logits=True, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(out.loss.item(), 4))
        context.progress((at + 1) * batch * length, steps * batch * length, "tokens")
        if (at + 1) % SAVED_EVERY == 0:
            _save(context, model, optimizer, schedule, at + 1, losses)
    model.config.use_cache = True
    model.eval().save_pretrained(context.out)
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
