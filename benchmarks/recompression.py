"""What a run computes again after a new fine-tune: the same bytes elsewhere, one layer, all routers, or everything changed.

python -m benchmarks.recompression
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.rows import Row

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "mixtral-small"
TEXT = "python:stdlib/a*.py"
SAMPLE = ("calibration.sequences=8", "calibration.length=128", "heldout.sequences=8", "heldout.length=128", "keep=6")

CHANGED: dict[str, Callable[[str], bool]] = {
    "nothing, another folder": lambda name: False,
    "the last layer": lambda name: ".layers.3." in name,
    "the first layer": lambda name: ".layers.0." in name,
    "all routers": lambda name: ".gate.weight" in name,
    "everything": lambda name: True,
}
"""What differs from the model of the first run, by a part of the tensors' names on disk."""


def main() -> tuple[list[Row], str]:
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        table = [
            "| changed | steps run | of | seconds, of the first run's | bytes added, of the first run's |",
            "|---|---|---|---|---|",
        ]
        rows: list[Row] = []
        first = _run(top, "first", lambda name: False)
        table.append(f"| (the first run) | {first[0]} | {first[1]} | 1 | 1 |")
        for what, changed in CHANGED.items():
            steps, of, seconds, added = _run(top, what, changed)
            table.append(f"| {what} | {steps} | {of} | {seconds / first[2]:.2f} | {added / first[3]:.3f} |")
            if what.startswith("nothing"):
                rows.append(
                    Row(
                        "bytes added by a run on the same model in another folder, of the first run's",
                        added / first[3],
                        "at most",
                        0.01,
                        "",
                    )
                )
    return rows, "\n".join(table)


def _run(top: Path, name: str, changed: Callable[[str], bool]) -> tuple[int, int, float, int]:
    """Compress a copy of the model whose tensors `changed` names differ: steps run, steps in all, seconds, and bytes added.

    Each name has noise of its own, so that no run finds what another one made.
    """
    seed = [*CHANGED, "first"].index(name)
    model, store = top / "models" / name.replace(" ", "-"), top / "store"
    shutil.copytree(MODEL, model)
    for shard in model.glob("*.safetensors"):
        tensors = load_file(shard)
        if any(map(changed, tensors)):
            generator = torch.Generator().manual_seed(seed)
            for tensor, value in [*tensors.items()]:
                if changed(tensor):
                    noise = torch.randn(value.shape, generator=generator)
                    tensors[tensor] = (value.float() + 0.02 * value.float().std() * noise).to(value.dtype)
            save_file(tensors, shard, metadata={"format": "pt"})
    given = [f"model={model}", f"tokens={TEXT}", f"heldout.texts={TEXT}", *SAMPLE]
    words = ["run", "pipelines/mixtral.py", "--store", str(store), "--name", "bench", "--runner", "process", "--json"]
    words += [w for g in given for w in ("-p", g)]
    before = _bytes(store)
    code = "from moeflow.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    told = json.loads(done.stdout.splitlines()[-1])
    ran = told["steps"]["run"]
    return ran, ran + told["steps"]["stored"], told["seconds"], _bytes(store) - before


def _bytes(store: Path) -> int:
    return sum(p.stat().st_size for p in (store / "blobs").rglob("*") if p.is_file())


if __name__ == "__main__":
    measured, lines = main()
    for row in measured:
        print(row.line())
    print(lines)
