"""A version's files, copied into a folder that transformers loads, or into the form that one engine takes."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from moeflow.engines import Engine, engine_of, form_of
from moeflow.engines.form import CLASSES, OWN, WHOLE
from moeflow.model_files import INDEX
from moeflow.store import Store

T = TypeVar("T")
CONFIG = "config.json"
STARTS = {
    "vllm": "vllm serve {}",
    "vllm-moeflow": "vllm serve {}",
    "sglang": "python -m sglang.launch_server --model-path {}",
    "llama.cpp": "python convert_hf_to_gguf.py {}",
}
"""How an engine is started on a folder; transformers otherwise."""
DENSE, AGAIN = "moeflow.model.dense", "remove it and pull again"
OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""How llama.cpp's converter calls the precision of a checkpoint; left to itself, it writes fp32 in 16 bits."""


@dataclass(frozen=True)
class Wanted:
    """What is to become of the files."""

    dense: bool = False
    """Low-rank matrices are multiplied out."""
    engine: Engine | None = None
    """What is to load them; None: transformers, with moeflow where the model needs it."""
    packed: bool = False
    """Experts are packed."""

    @staticmethod
    def of(store: Store, key: str, word: str, *, dense: bool) -> "Wanted":
        """What an engine needs of a version. Raises ValueError, before a file is copied, if no form of it is one that it loads."""
        engine, stored = engine_of(word), store.artifact(key)
        if CONFIG not in stored.names():
            raise ValueError(f"{key} is no checkpoint, which an engine could load; pull it without --engine")
        config = json.loads(bytes(stored.read(CONFIG, 0, stored.size(CONFIG))))
        form = form_of(config)
        why, out = form.dense.why_not(engine), form.ranks and not engine.ranks
        if out and not why and not engine.counts:
            why = replace(form.dense, own=_type_multiplied_out(store, key).startswith(OWN)).why_not(engine)
        if why:
            ways = f"pull it for --engine {form.runs_in()}, or compress again for this one: moeflow fit --engine {engine.word}"
            raise ValueError(f"{engine.name} does not load {key}: {'; '.join(why)}; {ways}")
        return Wanted(dense or out, engine, form.packings != {WHOLE})

    def start(self, folder: Path) -> str:
        """How the engine is started on the folder."""
        name = self.engine.name if self.engine else ""
        return STARTS.get(name, "see README.md there").format(folder)


def multiplied_out(folder: Path) -> dict[str, Any]:
    """Multiply the factors in a pulled folder. Returns the number of matrices, and the bytes before and after."""
    made: dict[str, Any] = _done(["-m", DENSE, str(folder)], f"{folder} may be half done, remove it and pull again")
    return made


def for_engine(folder: Path, engine: Engine) -> dict[str, Any]:
    """Write into a pulled config.json what the engine reads besides. Returns the bytes of weights that it keeps in memory."""
    made: dict[str, Any] = _done(["-m", "moeflow.model.for_engine", str(folder), engine.word], AGAIN)
    return made


def converted(folder: Path, converter: Path) -> dict[str, Any]:
    """Write model.gguf beside the pulled files, with llama.cpp's own converter, in their own precision.

    Raises OSError with its last words if it fails.
    """
    file, config = folder / "model.gguf", json.loads((folder / CONFIG).read_text())
    dtype = str(config.get("dtype") or config.get("torch_dtype"))
    why = _refused(converter, folder, "--outfile", str(file), "--outtype", OUTTYPES.get(dtype, "auto"))
    if why or not file.is_file():
        raise OSError(f"{converter.name} does not convert {folder}: {why or 'it wrote no file'}; the folder itself is whole")
    return {"file": str(file), "bytes": file.stat().st_size}


def _type_multiplied_out(store: Store, key: str) -> str:
    """The model type that a low-rank version would have once it is multiplied out, found without its weights."""
    stored, files = store.artifact(key), dict[str, str]()
    for name in stored.names():
        if name.endswith(".safetensors"):
            size = int.from_bytes(stored.read(name, 0, 8), "little")
            files |= dict.fromkeys(json.loads(bytes(stored.read(name, 8, 8 + size))).keys() - {"__metadata__"}, name)

    def type_in(folder: Path) -> str:
        (folder / INDEX).write_text(json.dumps({"weight_map": files}))
        return str(_done(["-m", DENSE, str(folder), "--type"], "pull it without --engine"))

    return _of_small_files(store, key, type_in)


def _of_small_files(store: Store, key: str, what: Callable[[Path], T]) -> T:
    """What a function makes of a folder with a version's files beside its weights."""
    stored = store.artifact(key)
    with tempfile.TemporaryDirectory() as made:
        for name in stored.names():
            if "/" not in name and ".safetensors" not in name:
                (Path(made) / name).write_bytes(stored.read(name, 0, stored.size(name)))
        return what(Path(made))


def check_tokenizer(store: Store, key: str, converter: Path) -> None:
    """Let llama.cpp's converter read a version's tokenizer, before the weights are copied. Raises ValueError if it cannot."""

    def refused(folder: Path) -> str:
        config = json.loads((folder / CONFIG).read_text())
        config |= {"model_type": str(config.get("model_type")).removeprefix(OWN)}
        config |= {"architectures": [str(name).removeprefix(CLASSES) for name in config.get("architectures") or ()]}
        config.pop("quantization_config", None)
        (folder / CONFIG).write_text(json.dumps(config))
        return _refused(converter, folder, "--outfile", str(folder / "vocabulary.gguf"), "--vocab-only")

    if why := _of_small_files(store, key, refused):
        way_out = "pip install gguf sentencepiece" if "No module named" in why else "pull it without --converter"
        raise ValueError(f"{converter.name} does not take the tokenizer of {key}: {why}; nothing was copied: {way_out}")


def _refused(converter: Path, folder: Path, *words: str) -> str:
    """Run the converter on a folder. Returns its last words if it fails, otherwise ""."""
    command = [sys.executable, str(converter.absolute()), str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    return (done.stderr.strip().splitlines() or [f"it ended with {done.returncode} and said nothing"])[-1]


def pull(store: Store, key: str, folder: Path, wanted: Wanted) -> dict[str, Any]:
    """Copy the files of `key` into a new or empty folder, and change them as wanted. Returns what was done.

    Raises FileExistsError, NotStored, CorruptBlob, StoreError and OSError.
    """
    store.fetch(key, folder)
    made: dict[str, Any] = {"dense": multiplied_out(folder)} if wanted.dense else {}
    if wanted.engine:
        made["engine"] = {"name": wanted.engine.name} | for_engine(folder, wanted.engine)
    return made


def _done(words: Sequence[str], way_out: str) -> Any:
    """What a process of its own prints as JSON: this one need not have loaded torch. Raises OSError if it fails."""
    done = subprocess.run([sys.executable, "-P", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        raise OSError(f"{said[-1]}; {way_out}")
    return json.loads(done.stdout)
