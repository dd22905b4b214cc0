"""Run code that a model wrote, with its tests, in a process of its own.

The process has a time, a memory and a file-size limit, an empty environment, a temporary folder as its place, and may start no
process or thread. Where the kernel lets an ordinary user make namespaces, it has no network, and whatever it started ends with it.

What this does not protect from: the code can read every file that this user can read, and write where this user can write. Root
is not held to the limit of processes. Code that is written to deceive could find the word by which it proves that it came to its
end. It is made for a model's mistakes; for a model that one does not trust, run the whole job in a container or a virtual machine.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("sandboxed.py")
MEMORY = 1 << 30  # bytes of address space
FILE = 16 << 20  # bytes of a file that it writes


@dataclass(frozen=True)
class Ran:
    """How a program ended: whether it came to its end, and whether it had no network."""

    passed: bool
    alone: bool


def ran(program: str, seconds: float, memory: int = MEMORY) -> Ran:
    """Run a program. It has passed if it came to its end: an exception, an exit or a signal before is a failure."""
    word = secrets.token_hex(16)
    reading, writing = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix="moeflow-code-") as folder:
            limits = [str(seconds), str(memory), str(FILE), str(writing)]
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(CHILD), *limits], cwd=folder, env={}, pass_fds=[writing], start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            os.close(writing)
            writing = -1
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(f"{word}\n{program}".encode("utf-8", "replace"), timeout=seconds + 5)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            os.set_blocking(reading, False)  # what it started without a namespace may hold the other end
            told = b""
            with suppress(BlockingIOError):
                told = os.read(reading, 1 << 12)
            lines = told.decode(errors="replace").split("\n")
            return Ran(word in lines, "alone" in lines)
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)
