"""Compile the extensions of DeepSpeed on first use: once per Python environment, in one process at a time.

In torch one process compiles, and the others wait until it removes a file; if it is killed, they wait forever. So each process
first takes a lock that is released when it dies. A file that is still there then is a dead process's, and is removed.
"""

import fcntl
import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from moeflow.machine import NO_COMPILER, compiler, without_spaces

COMMUNICATION, ADAM = "ShareMemCommBuilder", "CPUAdamBuilder"
"""The extensions for a gang without GPUs, and for an optimizer state in main memory."""


def load(*builders: str) -> None:
    """Load these extensions into this process, before DeepSpeed needs them.

    They are in this Python environment's folder below TORCH_EXTENSIONS_DIR (by default torch's own cache), and the variable is set
    to that folder. Another environment's headers would make torch compile them again, and no other program uses the folder.
    Raises ValueError without a C++ compiler, and if it fails.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import get_default_build_root

    if shutil.which("ninja") is None:  # it compiles them, and is installed beside this Python
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    place = "moeflow-" + hashlib.sha256(f"{sys.prefix} {sys.version}".encode()).hexdigest()[:12]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root = root if root.name == place else root / place
    root.mkdir(parents=True, exist_ok=True)
    root = without_spaces(root)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(root)
    with (root / ".moeflow-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in root.glob("*/lock"):
            stale.unlink()
        for name in builders:
            builder = get_accelerator().create_op_builder(name)
            if builder.is_compatible(verbose=False):  # otherwise DeepSpeed does without it
                _load(builder)


def _load(builder: Any) -> None:
    if (found := compiler()) is None:
        raise ValueError(NO_COMPILER)
    os.environ["CXX"] = found
    try:
        builder.load(verbose=False)
    except Exception as error:  # torch puts all that ninja and the compiler have said into one RuntimeError
        said = [line.strip() for line in str(error).splitlines() if "error" in line.lower()] or [str(error).strip()]
        raise ValueError(
            f"{found} cannot compile DeepSpeed's {builder.name}: {said[-1][:300]}; TORCH_EXTENSIONS_DIR is "
            f"{os.environ['TORCH_EXTENSIONS_DIR']}, --debug shows all of it"
        ) from error
