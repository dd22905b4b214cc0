"""Load whole models as transformers does, and time them in turns."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

ROUNDS = 5
DECODED = 32


def device_and_memory() -> tuple[str, int]:
    """The device that models run on in this process, and its free bytes."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.mem_get_info()[0]
    return "cpu", psutil.virtual_memory().available


@torch.inference_mode()
def measure(
    folders: Sequence[Path], device: str, length: int, progress: Callable[[int, int, str], None]
) -> dict[str, tuple[float, ...]]:
    """The "prefill" and "decode" of each model in tokens per second, and its "resident bytes".

    Speeds are medians of alternating rounds after a warm-up. Prefill is one sequence of `length` tokens; decode continues it by
    `DECODED` tokens, one by one.
    """
    logging.disable_progress_bar()
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(f, dtype="auto", device_map=device).eval() for f in folders]
    ids = torch.randint(0, models[0].config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    for turn in range(ROUNDS + 1):
        for model, taken in zip(models, times, strict=True):
            once = _once(model, ids, device)
            if turn:  # the first round warms up
                taken.append(once)
        progress(turn + 1, ROUNDS + 1, "rounds")
    return {
        "prefill": tuple(length / statistics.median(t[0] for t in taken) for taken in times),
        "decode": tuple(DECODED / statistics.median(t[1] for t in taken) for taken in times),
        "resident bytes": tuple(
            sum(t.nbytes for t in {p.data_ptr(): p for p in [*m.parameters(), *m.buffers()]}.values()) for m in models
        ),
    }


def _once(model: Any, ids: torch.Tensor, device: str) -> tuple[float, float]:
    """The seconds of one prefill and one decode."""
    start = _now(device)
    out = model(ids, use_cache=True)
    middle = _now(device)
    for _ in range(DECODED):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    return middle - start, _now(device) - middle


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
