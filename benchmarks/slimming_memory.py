"""How much memory slimming a layer takes, and how much of it the plan foresees, whatever the number of experts.

One Mixtral layer of 4 and of 16 experts of 1024×2048 in bf16, 4,096 recorded tokens; GPTQ at 4 bits written whole and packed,
SparseGPT 2:4, and AWQ, which has all experts of a layer in memory. Everything up to the step is stored by one process; another runs
the step alone, and says the most that was resident, torch and transformers included, without pages of files.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.calibrate import forget_peak, peak
from benchmarks.rows import Row
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.recipes import unified
from moeflow.methods.slim.methods import Slimming
from moeflow.run import in_process
from moeflow.sources import Texts, pin
from moeflow.step import Step, step_of
from moeflow.store import Store

WIDTH, INNER, LENGTH, SEQUENCES = 1024, 2048, 256, 16
FEW, MANY = 4, 16
AWQ = "AWQ, packed"
WAYS: dict[str, dict[str, Any]] = {
    "GPTQ, packed": {"method": "gptq", "bits": 4, "group": 128},
    "GPTQ, written whole": {"method": "gptq", "bits": 4, "group": 128, "packed": False},
    "SparseGPT 2:4": {"method": "sparsegpt", "pattern": "2:4"},
    AWQ: {"method": "awq", "bits": 4, "group": 128},
}


def write(folder: Path, experts: int) -> None:
    """A model of one layer, and tokens."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=512, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=8, num_local_experts=experts, num_experts_per_tok=2, max_position_embeddings=LENGTH,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "model")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, 512, (SEQUENCES, LENGTH)))


def step_in(folder: Path, way: str) -> Step:
    """The step that slims the only layer."""
    model = checkpoint.pinned(pin(str(folder / "model"), kind="model"))
    matrix = data.tokens(Texts(str(folder / "tokens.npy")), model, Sample(SEQUENCES, LENGTH))
    calibration = calibrate.run(model, matrix, Pass(batch=4, shard=SEQUENCES, dtype="float32"))
    (layer,) = unified.slim(calibration, Slimming(inputs="parallel", **WAYS[way])).layers
    return layer


def prepare(folder: Path) -> None:
    store = Store.open(str(folder / "store"))
    in_process.run([step_of(i) for way in WAYS for i in step_in(folder, way).inputs], store)


def alone(folder: Path, way: str) -> dict[str, int]:
    """The step by itself: its peak, and what is planned."""
    store, step = Store.open(str(folder / "store")), step_in(folder, way)
    assert not store.has(step.key) and all(store.has(step_of(i).key) for i in step.inputs)
    forget_peak()
    in_process.run([step], store)
    return {"peak": peak(), "planned": step.spec.memory, "weights": step.inputs[1].spec.output.nbytes}


def main() -> list[Row]:
    rows, beyond = [], {}
    for experts in (FEW, MANY):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(folder, experts)
            _child("prepare", folder)
            for way in WAYS:
                usage = _child(way, folder)
                beyond[way, experts] = usage["peak"] - usage["weights"]
                what = f"{way}: peak memory for {experts} experts, of the {usage['planned'] / 2**30:.2f} GiB that are planned"
                rows.append(Row(what, usage["peak"] / usage["planned"], "at most", 1, "times"))
    for way in WAYS:
        if way != AWQ:
            what = f"{way}: memory beyond the layer's weights, {MANY} experts against {FEW}"
            rows.append(Row(what, beyond[way, MANY] / beyond[way, FEW], "at most", 1.1, "times"))
    return rows


def _child(what: str, folder: Path) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.slimming_memory", what, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    usage: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return usage


if __name__ == "__main__":
    torch.set_num_threads(1)
    _, what, path = sys.argv
    print(json.dumps(prepare(Path(path)) or {} if what == "prepare" else alone(Path(path), what)))
