"""The tensor code on a GPU: is it right, and how far is it from a naive version and from what the device allows?

    python -m benchmarks.gpu                # on the GPU, nine minutes at most
    python -m benchmarks.gpu --small        # on the processor with small sizes, in moments

It needs torch, transformers, safetensors and numpy, and no file beside this repository's own. First every tensor path is compared
with the processor (`gpu_paths`), then works at the sizes of real layers are timed (`gpu_speed`). The table goes to the standard
output; what no longer fits into the time is named. The exit code is 1 if a path is off or failed.
"""

import argparse
import datetime
import gc
import platform
import sys
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
import transformers

from benchmarks.gpu_paths import TensorPath, paths
from benchmarks.gpu_speed import WORKS, Clock, Peaks, Size, real_sizes, seconds, small_sizes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Half(NamedTuple):
    """One half of the table: its rows, whether nothing is off or failed, and whether everything was run."""

    rows: list[str]
    right: bool
    whole: bool


def machine(device: str) -> str:
    """The date, the device and the versions, in one line."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()}, no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{datetime.date.today()}, {name}; {versions}"


FAILURES = (RuntimeError, TypeError, ValueError, IndexError)
"""What torch raises where a device cannot do what it is asked for; each is told in the row of what failed, and the others go on."""


def correctness(device: str, every: Iterable[TensorPath], end: float) -> Half:
    """All paths in both precisions; one that no longer fits is a row, too."""
    rows, right, whole = [], True, True
    for path in every:
        for name, dtype in DTYPES.items():
            if time.monotonic() > end:
                rows.append(f"| {path.name} | {name} | | | not run: no time left |")
                whole = False
                continue
            try:
                apart = path.distance(device, dtype)
                holds = apart <= path.bound(dtype)
                rows.append(f"| {path.name} | {name} | {apart:.2g} | {path.bound(dtype):g} | {'yes' if holds else 'NO'} |")
            except FAILURES as error:
                holds = False
                rows.append(f"| {path.name} | {name} | | {path.bound(dtype):g} | NO: {one_line(error)} |")
            right &= holds
    return Half(rows, right, whole)


def speed(clock: Clock, sizes: list[Size], peaks: Peaks, end: float) -> Half:
    """All works on all sizes; one that no longer fits is a row, too."""
    rows, right, whole = [], True, True
    for name, (work, needs) in WORKS.items():
        for size in sizes:
            if time.monotonic() + needs > end:
                rows.append(f"| {size.name} | {name} | not run: no time left | | | | | |")
                whole = False
                continue
            try:
                rows += [timed.line(size.name) for timed in work(size, clock, peaks)]
            except FAILURES as error:
                right = False
                rows.append(f"| {size.name} | {name} | failed: {one_line(error)} | | | | | |")
            gc.collect()
            if clock.device == "cuda":
                torch.cuda.empty_cache()
    return Half(rows, right, whole)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()).replace('|', '/')[:160]}"


@torch.no_grad()
def main(arguments: list[str] | None = None, every: Iterable[TensorPath] | None = None) -> int:
    """Print the table. 1 if a path is off, or a work failed. `every`: other paths than all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="The tensor code on a GPU: right, and how fast.")
    parser.add_argument("--small", action="store_true", help="on the processor, with small sizes")
    parser.add_argument("--minutes", type=float, default=9.0, help="no work begins that would take longer in all")
    parser.add_argument("--only", choices=("correctness", "speed"), help="one half of the table")
    asked = parser.parse_args(arguments)
    if not asked.small and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; give --small to run on the processor, or install a torch with CUDA")
    start, device = time.monotonic(), "cpu" if asked.small else "cuda"
    end, halves = start + 60 * asked.minutes, []
    print(f"## gpu\n\n{machine(device)}\n", flush=True)
    if asked.only != "speed":
        halves.append(correctness(device, paths() if every is None else every, end))
        print("| path | precision | relative distance from the processor | at most | held |\n|---|---|---|---|---|")
        print("\n".join(halves[-1].rows), end="\n\n", flush=True)
    if asked.only != "correctness":
        clock = Clock(device, most=0.05 if asked.small else 3.0)
        peaks = Peaks.of(clock, small=asked.small)
        reached = ", ".join(f"{peaks.operations[dtype] / 1e12:.3g} TFLOP/s in {name}" for name, dtype in DTYPES.items())
        print(f"Measured here: {peaks.bandwidth / 1e9:.4g} GB/s, {reached}.\n")
        halves.append(speed(clock, small_sizes() if asked.small else real_sizes(), peaks, end))
        print("| layer | work | ours | naive | times faster | floor | times the floor | naive is |")
        print("|---|---|---|---|---|---|---|---|")
        print("\n".join(halves[-1].rows), end="\n\n")
    right, whole = (all(getattr(half, what) for half in halves) for what in ("right", "whole"))
    said = "what was run is right, but not all was run" if not whole else "every path is right"
    print(f"{seconds(time.monotonic() - start)} in all; {said if right else 'a path is NOT right'}.")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
