"""Reading beside computing: a pass whose layers take as long to read as to compute, against the longer of the two.

A layer's file is made to arrive as slowly as its computation takes here, as from a store that is so far away; what is timed is the
tensor side of `calibrate.advance`, from the first read to the last state.

    python -m benchmarks.overlap
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.rows import Row
from moeflow.arch import Config, Family
from moeflow.methods.pretrain.steps import Shape, table_of
from moeflow.model import passes
from moeflow.model.ahead import ahead

LAYERS, ROUNDS = 16, 3
SEQUENCES, LENGTH, BATCH = 16, 256, 8


def main() -> list[Row]:
    """The ratio of rows: read ahead, and read one after the other as it was."""
    torch.manual_seed(0)
    config = Shape(width=256, ffn=512, layers=LAYERS).config(LENGTH)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = layers_in(folder, config)
        save_file({"hidden_NLD": torch.randn(SEQUENCES, LENGTH, 256)}, folder / "start")
        run = partial(passed, config, folder)
        run(iter(files))  # libraries are loaded
        computing = median(seconds(lambda: run(iter(files))) for _ in range(ROUNDS))
        each = computing / LAYERS
        # as `calibrate.advance` has its files fetched
        beside = median(seconds(lambda: run(ahead(slowly(file, each) for file in files))) for _ in range(ROUNDS))
        apart = median(seconds(lambda: run(iter([slowly(file, each) for file in files]))) for _ in range(ROUNDS))
    what = f"a pass over {LAYERS} layers that take as long to read as to compute, against computing alone"
    return [
        Row(f"{what}: the next layer read beside", beside / computing, "at most", 1.15, "times"),
        Row(f"{what}: read, then computed", apart / computing, "at least", 1.15, "times"),
    ]


def layers_in(folder: Path, config: Config) -> list[Path]:
    """The files of a random model's layers."""
    files, family = [], Family.of(config)
    for i in range(LAYERS):
        prefix = family.prefix(i)
        table = {n: shape for n, (_, shape) in table_of(config).items() if n.startswith(prefix)}
        files.append(folder / f"layer-{i}.safetensors")
        save_file({n: torch.randn(shape) / 16 if len(shape) > 1 else torch.ones(shape) for n, shape in table.items()}, files[-1])
    return files


def passed(config: Config, folder: Path, files: Iterator[Path]) -> None:
    how: dict[str, Any] = {"count": LAYERS, "batch": BATCH, "dtype": "float32"}
    passes.through(config, folder / "start", enumerate(files), folder / "end", progress=lambda *_: None, **how)


def slowly(file: Path, took: float) -> Path:
    """A file that arrives after so many seconds."""
    time.sleep(took)
    return file


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    for row in main():
        print(row.line())
