"""The models on which moeflow and its peers are compared, the tokens that all get, and the judgement of what came of it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality import CALIBRATION, HELDOUT, HELDOUT_PASS, LENGTH, SEQUENCES, SHARED
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Sample
from moeflow.methods.recipes import compare
from moeflow.run import in_process
from moeflow.sources import Texts, pin
from moeflow.store import Store

Make = Callable[[Path], Path]
SMALL = SHARED / "models" / "mixtral-21m"
WIDTHS = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
HUB = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""The hub's names of an expert's matrices, by those that llm-compressor and auto-round write."""
EXPERT = re.compile(rf"(\.block_sparse_moe\.experts\.\d+\.)({'|'.join(HUB)})\b")


def trained(folder: Path) -> Path:
    """The Mixtral of 21 M parameters in float32, in a new folder: what a side rounds to is then its own affair."""
    from safetensors.torch import load_file, save_file

    _configured(folder, {})
    save_file(
        {n: t.float() for n, t in load_file(SMALL / "model.safetensors").items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def random(folder: Path) -> Path:
    """A random Mixtral of 730 M parameters in float32, in a new folder, with the small one's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _configured(folder, WIDTHS)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).save_pretrained(folder)
    return folder


def _configured(folder: Path, changes: dict[str, int]) -> None:
    """A new folder with the small model's configuration, changed, and its tokenizer."""
    folder.mkdir(parents=True)
    for file in SMALL.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    config = json.loads((SMALL / "config.json").read_text()) | {"dtype": "float32"} | changes
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def tokens(store: Path) -> NDArray[np.int32]:
    """The calibration's token ids, [sequences, length]."""
    matrix = data.tokens(Texts(CALIBRATION), checkpoint.pinned(pin(str(SMALL), kind="model")), Sample(SEQUENCES, LENGTH))
    opened = Store.open(str(store))
    in_process.run([matrix], opened)
    read: NDArray[np.int32] = np.load(opened.artifact(matrix.key).file("tokens.npy"))
    return read


def with_hub_names(folder: Path) -> None:
    """Give the experts of a Mixtral checkpoint the hub's names, in place: under others transformers loads random experts."""
    from safetensors.torch import load_file, save_file

    def renamed(text: str) -> str:
        return EXPERT.sub(lambda found: found[1] + HUB[found[2]], text)

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if any(renamed(name) != name for name in tensors):
            save_file({renamed(name): tensor for name, tensor in tensors.items()}, file, {"format": "pt"})
    for file in folder.glob("*.json"):
        file.write_text(renamed(file.read_text()))


def nbytes(folder: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def kl_to(original: Path, compressed: Path, sequences: int, store: Path) -> list[float]:
    """The mean KL of a checkpoint to its original on so many sequences of each held-out text, in nats a token."""
    first, second = (checkpoint.pinned(pin(str(folder), kind="model")) for folder in (original, compressed))
    compared = compare.reports(first, second, compare.HeldOut(HELDOUT, sequences, LENGTH, bos=False), HELDOUT_PASS)
    reports, opened = [r for r in compared if r.name == "evaluate.quality"], Store.open(str(store))
    in_process.run(reports, opened)
    read: list[dict[str, Any]] = [json.loads(opened.artifact(r.key).file("report.json").read_text()) for r in reports]
    return [float(np.mean(r["divergence_of_sequences"])) for r in read]
