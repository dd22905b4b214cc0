"""The parts of DeepSpeed that are compiled on first use: once per Python environment, by one process at a time.

In torch one process compiles, and the others wait until it removes a file; if it is killed, they wait for ever. So each process
first takes a lock that ends with it. A file that is still there then was left by a dead process, and is removed.
"""

import fcntl
import hashlib
import os
import shutil
import sys
from pathlib import Path

COMMUNICATION, ADAM = "ShareMemCommBuilder", "CPUAdamBuilder"
"""The extensions for a gang without GPUs, and for an optimizer state in main memory."""


def load(*builders: str) -> None:
    """Load these extensions into this process, before DeepSpeed needs them.

    They lie in a folder of this Python environment below TORCH_EXTENSIONS_DIR (by default torch's own cache), and the variable is
    set to that folder. Another environment's headers would make torch compile them again, and no other program compiles there.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import get_default_build_root

    if shutil.which("ninja") is None:  # it compiles them, and lies beside this Python
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    place = "moeflow-" + hashlib.sha256(f"{sys.prefix} {sys.version}".encode()).hexdigest()[:12]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root = root if root.name == place else root / place
    os.environ["TORCH_EXTENSIONS_DIR"] = str(root)
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".moeflow-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in root.glob("*/lock"):
            stale.unlink()
        for name in builders:
            builder = get_accelerator().create_op_builder(name)
            if builder.is_compatible(verbose=False):  # otherwise DeepSpeed does without it
                builder.load(verbose=False)
