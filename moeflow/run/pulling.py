"""A version's files, copied into a folder that transformers loads; its low-rank matrices multiplied out where that is asked for."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from moeflow.store import Store


def multiplied_out(folder: Path) -> dict[str, Any]:
    """Multiply the factors in a pulled folder, in a process of its own, because this one need not have loaded torch.

    Returns the number of matrices, and the bytes before and after. Raises OSError if the process fails.
    """
    words = [sys.executable, "-P", "-m", "moeflow.model.dense", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"the process that multiplies ended with {done.returncode}"]
        raise OSError(f"{said[-1]}; {folder} may be half done, remove it and pull again")
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def pull(store: Store, key: str, folder: Path, *, dense: bool = False) -> dict[str, Any]:
    """Copy the files of `key` into a new or empty folder. Returns what `multiplied_out` says if that is asked for.

    Raises FileExistsError, NotStored, CorruptBlob and StoreError.
    """
    store.fetch(key, folder)
    return multiplied_out(folder) if dense else {}
