"""A stand-in for a model, and a pipeline that compresses it, for tests of what happens around a compression.

The checkpoint's config.json says which KL its compression has, and which experts are kept.
"""

import json
import struct
from pathlib import Path
from typing import Any

from moeflow.cli import main
from moeflow.sources import Source
from moeflow.step import Artifact, Context, Spec, Step, step

KL, BYTES = "kl[prose]", "bytes"


def shard(values: bytes) -> bytes:
    """A safetensors file with these bytes as its one tensor."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(values)], "data_offsets": [0, len(values)]}}).encode()
    return struct.pack("<Q", len(header)) + header + values


def files(seed: int, *, kl: float = 0.01, keep: tuple[int, ...] = (0, 1), shards: int = 2) -> dict[str, bytes]:
    """The files of a checkpoint; only the first of its shards differs from those of another seed."""
    names = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    index = {"metadata": {}, "weight_map": {f"w{n}": name for n, name in enumerate(names)}}
    made = {name: shard(bytes([n, seed if n == 0 else 0])) for n, name in enumerate(names)}
    config = {"model_type": "toy", "kl": kl, "keep": list(keep)}
    return made | {"model.safetensors.index.json": json.dumps(index).encode(), "config.json": json.dumps(config).encode()}


def write(folder: Path, seed: int, **about: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files(seed, **about).items():
        (folder / name).write_bytes(data)
    return folder


@step("test.halved", version=1)
def halved(context: Context, shard: Artifact) -> None:
    """Every second byte of a shard."""
    (name,) = shard.names()
    (context.out / "half").write_bytes(shard.read(name, 0, shard.size(name))[::-2])


@step("test.assembled", version=1)
def assembled(context: Context, config: Artifact, halves: tuple[Artifact, ...]) -> None:
    (context.out / "model").write_bytes(b"".join(h.file("half").read_bytes() for h in halves))
    keep = json.loads(config.file("config.json").read_text())["keep"]
    (context.out / "moeflow.json").write_text(json.dumps({"choices": [{"layer": 0, "experts": 4, "keep": keep}], "layers": []}))


@step("test.judged", version=1, spec=lambda config: Spec(figures=(KL, BYTES)))
def judged(context: Context, config: Artifact) -> None:
    kl = json.loads(config.file("config.json").read_text())["kl"]
    rows = [
        {"name": "KL (prose)", "unit": "", "original": 0.0, "compressed": kl, "figure": "kl", "text": "prose", "better": "lower"},
        {"name": "bytes", "unit": "B", "original": 100, "compressed": 60, "figure": "bytes", "better": "lower"},
    ]
    report = {"kind": "quality", "columns": ["original", "compressed"], "rows": rows}
    (context.out / "report.json").write_text(json.dumps(report))


def build(model: Source, *, fail: bool = False) -> Step:
    """Raises ValueError where it is to fail."""
    if fail:
        raise ValueError("it is to fail")
    config = model.file("config.json")
    shards = [model.weights(n) for n in model.names() if n.endswith(".safetensors") and not n.startswith("adapter")]
    return assembled(config, tuple(halved(s) for s in shards)).reporting(judged(config))


if __name__ == "__main__":
    main(build)
