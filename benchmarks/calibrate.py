"""Calibration beside one plain forward of transformers over the same tokens: time, and peak resident memory.

Model: a random Mixtral of 16 layers, d=512, F=1792, 8 experts, fp32; 16 sequences of 512 tokens, four at a time. Recorded: router
logits and sums per expert for all tokens, MoE inputs for a quarter of them. Each side runs in processes of its own, in turns; the
shorter time counts. The plain side holds the whole model before its clock starts, and what loading it took is not held against it;
ours reads every layer while its clock runs.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from benchmarks.rows import Row
from moeflow.model import passes
from moeflow.model.checkpoint import Tensors, save
from moeflow.model.layout import Folder, read_config
from moeflow.model.spec import Recording

LAYERS, SEQUENCES, LENGTH, BATCH = 16, 16, 512, 4
TOKENS = SEQUENCES * LENGTH
ROUNDS = 2


def prepare(folder: Path) -> None:
    """A checkpoint, and the same as one file per layer and one for the rest."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1792, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=LENGTH, sliding_window=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tensors = Tensors(folder / "model")
    for i in range(LAYERS):
        save({n: tensors[n] for n in tensors if n.startswith(f"model.layers.{i}.")}, folder / f"layer-{i}.safetensors")
    (folder / "rest").mkdir()
    save({n: tensors[n] for n in tensors if ".layers." not in n}, folder / "rest" / "rest.safetensors")
    save_file({"ids": torch.randint(0, 4096, (SEQUENCES, LENGTH))}, folder / "ids.safetensors")


@torch.inference_mode()
def plain(folder: Path, ids_NL: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    model.model(ids_NL[:1], use_cache=False)
    forget_peak()
    start = time.perf_counter()
    for ids in ids_NL.split(BATCH):
        model.model(ids, use_cache=False)
    return time.perf_counter() - start


def ours(folder: Path, ids_NL: torch.Tensor) -> float:
    config = read_config(Folder(folder / "model"))
    layers = [(i, folder / f"layer-{i}.safetensors") for i in range(LAYERS)]
    forget_peak()
    start = time.perf_counter()
    passes.embed(config, Folder(folder / "rest"), ids_NL, folder / "hidden.safetensors", dtype="float32")
    passes.through(
        config, folder / "hidden.safetensors", layers, folder / "end.safetensors", count=LAYERS, batch=BATCH,
        dtype="float32", progress=lambda *_: None, recording=Recording(TOKENS // 4),
    )  # fmt: skip
    return time.perf_counter() - start


def forget_peak() -> None:
    """From here on the kernel's high-water mark of this process counts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes that were resident since `forget_peak`, without pages of files, which transformers keeps mapped."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * (int(status["VmHWM"].split()[0]) - int(status["RssFile"].split()[0]))


SIDES = {"plain": plain, "ours": ours}


def side(name: str, folder: Path) -> dict[str, float]:
    """One side in a process of its own: its seconds, and its peak resident bytes."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.calibrate", name, folder], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> list[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
        for _ in range(ROUNDS):
            for name in SIDES:
                runs[name].append(side(name, folder))
        layer = (folder / "layer-0.safetensors").stat().st_size
    seconds = {name: min(r["seconds"] for r in taken) for name, taken in runs.items()}
    most = {name: min(r["peak"] for r in taken) for name, taken in runs.items()}
    saved = (most["plain"] - most["ours"]) / (layer * (LAYERS - 1))
    return [
        Row("calibration, against one plain forward", seconds["ours"] / seconds["plain"], "at most", 1.3, "times the time"),
        Row("calibration, peak memory saved, of the weights beyond one layer", saved, "at least", 0.8, ""),
    ]


if __name__ == "__main__":
    where = Path(sys.argv[2])
    ids_NL = Tensors(where / "ids.safetensors")["ids"]
    taken = SIDES[sys.argv[1]](where, ids_NL)
    print(json.dumps({"seconds": taken, "peak": peak()}))
