"""Load whole models as transformers does, and time them in turns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.benchmark import Measurement, TaskSpec, timer

from moeflow.model.quiet import cache_name, load_whole, quiet

ROUNDS = 7
DECODED = 32


@dataclass(frozen=True)
class Speed:
    """Tokens per second: the median of all rounds, and the quartiles below and above it."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(tokens: int, seconds: Measurement) -> "Speed":
        low, high = (float(np.quantile(seconds.times, q)) for q in (0.25, 0.75))
        return Speed(tokens / seconds.median, tokens / high, tokens / low)

    def overlaps(self, other: "Speed") -> bool:
        """Do the ranges between the quartiles overlap, so that no difference was measured?"""
        return self.low <= other.high and other.low <= self.high


def device_and_memory() -> tuple[str, int]:
    """The device that models run on in this process, and its free bytes."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.mem_get_info()[0]
    return "cpu", psutil.virtual_memory().available


@torch.inference_mode()
def measure(
    folders: Sequence[Path], device: str, length: int, progress: Callable[[int, int, str], None]
) -> tuple[dict[str, tuple[Speed, ...]], tuple[int, ...]]:
    """The speeds of "prefill" and "decode" of each model, and the bytes that each has resident.

    The models take turns, in `ROUNDS` rounds after a warm-up. Prefill is one sequence of `length` tokens; decode continues it by
    `DECODED` tokens, one by one.
    """
    models: list[Any] = [load_whole(f, dtype="auto", device_map=device).eval() for f in folders]
    ids = torch.randint(0, models[0].config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    for turn in range(ROUNDS + 1):
        for model, taken in zip(models, times, strict=True):
            if turn:
                taken.append(_once(model, ids))
            else:  # the first round warms up
                with quiet():
                    _once(model, ids)
        progress(turn + 1, ROUNDS + 1, "rounds")
    speeds = {
        name: tuple(Speed.of(tokens, _measurement(name, [t[part] for t in taken])) for taken in times)
        for part, (name, tokens) in enumerate({"prefill": length, "decode": DECODED}.items())
    }
    resident = (sum(t.nbytes for t in {p.data_ptr(): p for p in [*m.parameters(), *m.buffers()]}.values()) for m in models)
    return speeds, tuple(resident)


def _once(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """The seconds of one prefill and one decode; the timer waits for the device."""
    name = cache_name(model)
    start = timer()
    out = model(ids, use_cache=True)
    middle = timer()
    for _ in range(DECODED):
        out = model(out.logits[:, -1:].argmax(-1), use_cache=True, **{name: out[name]})
    return middle - start, timer() - middle


def _measurement(name: str, seconds: list[float]) -> Measurement:
    return Measurement(1, seconds, TaskSpec(name, setup="", num_threads=torch.get_num_threads()))
