"""How fast two models run on this machine: whole, as transformers loads them, one alternating with the other."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from moeflow.methods.reports import row, write_report
from moeflow.model.layout import read_config
from moeflow.model.spec import CheckpointSpec
from moeflow.step import Artifact, Context, Spec, step


def here() -> dict[str, Any]:
    """What the speed of a model depends on beside the model: processor, cores, GPUs, torch."""
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return {
        "processor": _named(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": [_named(gpu, "Model") for gpu in gpus],
        "torch": metadata.version("torch"),
    }


def _named(path: Path, what: str) -> str:
    """The first value of `what` in a file of "name: value" lines, or nothing where there is no such file."""
    if not path.exists():
        return ""
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == what), "")


def _speed_spec(original: CheckpointSpec, compressed: CheckpointSpec, *, machine: Any, length: int) -> Spec:
    both = sum(c.nbytes + c.others for c in (original, compressed))
    return Spec(reads=both, writes=560)  # takes the memory that is free, or leaves the speed out


@step("evaluate.speed", version=1, spec=_speed_spec, gpus=1)
def speed(context: Context, original: Artifact, compressed: Artifact, *, machine: dict[str, Any], length: int) -> None:
    """Tokens per second of prefill (one sequence of `length`) and decode (one token at a time behind it), and resident bytes.

    Medians of alternating rounds after a warm-up; the machine is a parameter, since the numbers are facts about it. Where both
    models do not fit into memory at once the report says so and leaves them out.
    """
    from moeflow.methods.timing import DECODED, ROUNDS, device_and_memory, measure

    names, units = ("prefill", "decode", "resident bytes"), ("tokens/s", "tokens/s", "B")
    need = sum(a.size(n) for a in (original, compressed) for n in a.names() if n.endswith(".safetensors"))
    device, free = device_and_memory()
    positions = int(read_config(original).get("max_position_embeddings") or length + DECODED)
    length = min(length, positions - DECODED)
    note = ""
    if need * 1.2 > free:
        note = f"speed is left out: both models need {need:,} bytes at once, and {free:,} are free on {device}"
    elif length < 1:
        note = f"speed is left out: the model's {positions} positions leave none before the {DECODED} that are decoded"
    if note:
        write_report(context, "speed", [row(n, None, None, u) for n, u in zip(names, units, strict=True)], notes=[note])
        return
    figures = measure([original.folder(), compressed.folder()], device, length, context.progress)
    rows = [row(n, *figure, u) for n, figure, u in zip(names, figures, units, strict=True)]
    write_report(context, "speed", rows, machine=here(), asked_on=machine, sequence=length, rounds=ROUNDS)
