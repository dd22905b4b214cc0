"""The parts of DeepSpeed that are compiled on first use: once for each Python environment, by one process at a time.

torch lets one process compile and all others wait for a file that it removes when it is done; where it is killed they wait for
ever. So a lock that ends with its process stands before that file, and a file that is found behind it is a dead process's.
"""

import fcntl
import hashlib
import os
import shutil
import sys
from pathlib import Path

COMMUNICATION, ADAM = "ShareMemCommBuilder", "CPUAdamBuilder"
"""What is compiled for a gang without GPUs, and for an optimizer whose state lies in main memory."""


def load(*builders: str) -> None:
    """Load these extensions into this process; to be called before DeepSpeed asks for them, which then finds them loaded.

    They lie in a folder of this Python environment below TORCH_EXTENSIONS_DIR (by default torch's own cache), which is set to it:
    the headers of another environment would have them compiled again, and no other program compiles there.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import get_default_build_root

    if shutil.which("ninja") is None:  # which compiles them, and lies beside this Python
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
            if builder.is_compatible(verbose=False):  # DeepSpeed does without it where it is not
                builder.load(verbose=False)
