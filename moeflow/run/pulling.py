"""A version's files, copied into a folder that transformers loads, or into the form that one engine takes."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeflow.engines import Engine, engine_of, form_of
from moeflow.engines.form import OWN
from moeflow.store import Store

CONFIG = "config.json"
STARTS = {
    "vllm": "vllm serve {}",
    "vllm-moeflow": "vllm serve {}",
    "sglang": "python -m sglang.launch_server --model-path {}",
    "llama.cpp": "python convert_hf_to_gguf.py {}",
}
"""How an engine is started on a folder; transformers otherwise."""
BIASED = ("attention_bias", "lm_head_bias")
"""What vLLM's and llama.cpp's classes for Phi take as given."""


@dataclass(frozen=True)
class Wanted:
    """What is to become of the files."""

    dense: bool = False
    """Low-rank matrices are multiplied out."""
    engine: Engine | None = None
    """What is to load them; None: transformers, with moeflow where the model needs it."""

    @staticmethod
    def of(store: Store, key: str, word: str, *, dense: bool) -> "Wanted":
        """What an engine needs of a version. Raises ValueError, before a file is copied, if no form of it is one that it loads."""
        engine, stored = engine_of(word), store.artifact(key)
        if CONFIG not in stored.names():
            raise ValueError(f"{key} is no checkpoint, which an engine could load; pull it without --engine")
        config = json.loads(bytes(stored.read(CONFIG, 0, stored.size(CONFIG))))
        form = form_of(config)
        if why := form.dense.why_not(engine):
            ways = f"pull it for --engine {form.runs_in()}, or compress again for this one: moeflow fit --engine {engine.word}"
            raise ValueError(f"{engine.name} does not load {key}: {'; '.join(why)}; {ways}")
        if form.model_type == "phimoe" and engine.name in STARTS and not all(config.get(name) for name in BIASED):
            raise ValueError(
                f"{key} is a Phi without {' and '.join(BIASED)}, which {engine.name} takes as given; load it with transformers"
            )
        return Wanted(dense or (form.ranks and not engine.ranks), engine)

    def start(self, folder: Path) -> str:
        """How the engine is started on the folder."""
        name = self.engine.name if self.engine else ""
        return STARTS.get(name, "see README.md there").format(folder)


def multiplied_out(folder: Path) -> dict[str, Any]:
    """Multiply the factors in a pulled folder. Returns the number of matrices, and the bytes before and after."""
    return _done(["-m", "moeflow.model.dense", str(folder)], f"{folder} may be half done, remove it and pull again")


def for_engine(folder: Path, engine: Engine) -> dict[str, Any]:
    """Write into a pulled config.json what the engine reads besides. Returns the bytes of weights that it keeps in memory.

    Raises OSError if what was pulled is still in moeflow's own format and the engine does not load that.
    """
    made = _done(["-m", "moeflow.model.for_engine", str(folder), engine.word], "remove it and pull again")
    config = json.loads((folder / CONFIG).read_text())
    if str(config.get("model_type")).startswith(OWN) and not engine.counts:
        raise OSError(
            f"{folder} is in moeflow's own format ({config['model_type']}), since its family has no other for such experts, and "
            f"{engine.name} does not load that"
        )
    return made


def converted(folder: Path, converter: Path) -> dict[str, Any]:
    """Write model.gguf beside the pulled files, with llama.cpp's own converter. Raises OSError with its last words if it fails."""
    file = folder / "model.gguf"
    words = [sys.executable, str(converter.absolute()), str(folder), "--outfile", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode or not file.is_file():
        said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode} and wrote nothing"]
        raise OSError(f"{converter.name} does not convert {folder}: {said[-1]}; the folder itself is whole")
    return {"file": str(file), "bytes": file.stat().st_size}


def pull(store: Store, key: str, folder: Path, wanted: Wanted) -> dict[str, Any]:
    """Copy the files of `key` into a new or empty folder, and change them as wanted. Returns what was done.

    Raises FileExistsError, NotStored, CorruptBlob, StoreError and OSError.
    """
    store.fetch(key, folder)
    made: dict[str, Any] = {"dense": multiplied_out(folder)} if wanted.dense else {}
    if wanted.engine:
        made["engine"] = {"name": wanted.engine.name} | for_engine(folder, wanted.engine)
    return made


def _done(words: Sequence[str], way_out: str) -> dict[str, Any]:
    """What a process of its own prints as JSON: this one need not have loaded torch. Raises OSError if it fails."""
    done = subprocess.run([sys.executable, "-P", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        raise OSError(f"{said[-1]}; {way_out}")
    made: dict[str, Any] = json.loads(done.stdout)
    return made
