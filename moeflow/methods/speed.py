"""How fast two models run on this machine: whole, as transformers loads them, one alternating with the other."""

import os
import platform
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from moeflow.methods.reports import row, write_report
from moeflow.model.spec import CheckpointSpec
from moeflow.step import Artifact, Context, Spec, step

ROUNDS = 5
DECODED = 32


def machine() -> dict[str, Any]:
    """What the speed of a model depends on beside the model: processor, cores, GPUs, torch."""
    cuda = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _speed_spec(original: CheckpointSpec, compressed: CheckpointSpec, *, machine: Any, length: int) -> Spec:
    both = original.nbytes + compressed.nbytes
    return Spec(reads=both, writes=900, memory=2 * both)


@step("evaluate.speed", version=1, spec=_speed_spec)
@torch.inference_mode()
def speed(context: Context, original: Artifact, compressed: Artifact, *, machine: dict[str, Any], length: int) -> None:
    """Tokens per second of prefill (one sequence of `length`) and decode (one token at a time behind it), and resident bytes.

    Medians of alternating rounds after a warm-up; the machine is a parameter, since the numbers are facts about it. Where both
    models do not fit into memory at once the report says so and leaves them out.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    both = (original, compressed)
    need = sum(a.size(n) for a in both for n in a.names() if n.endswith(".safetensors"))
    names = ("prefill", "decode", "resident bytes")
    units = ("tokens/s", "tokens/s", "B")
    if need * 1.2 > (free := _free(device)):
        note = f"speed is left out: both models need {need:,} bytes at once, and {free:,} are free on {device}"
        write_report(context, "speed", [row(n, None, None, u) for n, u in zip(names, units, strict=True)], notes=[note])
        return
    models = [AutoModelForCausalLM.from_pretrained(a.folder(), dtype="auto") for a in both]
    models = [m.to(device).eval() for m in models]  # type: ignore[arg-type]
    positions = models[0].config.max_position_embeddings
    length = min(length, positions - DECODED - 1)
    ids = torch.randint(0, models[0].config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    times: list[list[tuple[float, float]]] = [[], []]
    for turn in range(ROUNDS + 1):
        for model, taken in zip(models, times, strict=True):
            measured = _once(model, ids, device)
            if turn:  # the first round warms up
                taken.append(measured)
        context.progress(turn + 1, ROUNDS + 1, "rounds")
    prefill = [length / statistics.median(t[0] for t in taken) for taken in times]
    decode = [DECODED / statistics.median(t[1] for t in taken) for taken in times]
    resident = [sum(t.nbytes for t in {p.data_ptr(): p for p in [*m.parameters(), *m.buffers()]}.values()) for m in models]
    figures = zip(names, (prefill, decode, resident), units, strict=True)
    rows = [row(n, value[0], value[1], u) for n, value, u in figures]
    write_report(context, "speed", rows, machine=machine, sequence=length, decoded=DECODED, rounds=ROUNDS)


def _once(model: Any, ids: torch.Tensor, device: str) -> tuple[float, float]:
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


def _free(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
