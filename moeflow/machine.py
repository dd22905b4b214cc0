"""What the machine that this process runs on has, as far as programs that others wrote need it. Standard library only."""

import hashlib
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")

NO_COMPILER = (
    f"there is no C++ compiler ({', '.join(COMPILERS)}, or what CXX names), with which DeepSpeed's extensions are compiled; "
    "install one, on Debian: apt-get install g++"
)


def compiler() -> str | None:
    """The C++ compiler that CXX names, or the first of the usual ones; None if it is not on the PATH."""
    asked = os.environ.get("CXX")
    return next((name for name in ((asked,) if asked else COMPILERS) if shutil.which(name)), None)


def has_gpu() -> bool:
    """Does a driver show a GPU? Torch may still be one that knows none."""
    return any(Path("/proc/driver/nvidia/gpus").glob("*")) or Path("/dev/kfd").exists()


def gpu_model() -> str:
    """What its driver calls the first GPU; "" if this process sees none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") == "":  # as Ray says to a step that was given none
        return ""
    for about in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        return next((line.partition(":")[2].strip() for line in about.read_text().splitlines() if line.startswith("Model:")), "")
    return ""


SHARE = "MOEFLOW_GPU_SHARE"


def gpu_share() -> float:
    """The part of its GPU's memory that the running step may take: less than 1 where several steps share one."""
    return float(os.environ.get(SHARE, "1"))


def this_process() -> str:
    """A name for this process that no other has, on any machine and after any restart; "" where the system tells too little."""
    try:
        return f"{_machine()}-{os.getpid()}-{_begun(os.getpid())}"
    except OSError:
        return ""


def has_ended(process: str) -> bool:
    """Whether the process with this name, of `this_process`, is over; False for one of another machine, which nobody here knows."""
    machine, _, rest = process.partition("-")
    pid, _, begun = rest.partition("-")
    try:
        if not begun or machine != _machine():
            return False
        return _begun(int(pid)) != begun
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def _machine() -> str:
    """This start of this machine, and the view of its processes that a container has."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    return _digest(boot + os.readlink("/proc/self/ns/pid"))


def _begun(pid: int) -> str:
    """When a process began, in ticks since its machine did. Raises FileNotFoundError if there is none, or only its body."""
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if state in "ZX":
        raise FileNotFoundError(f"process {pid} is over")
    return fields[18]


def without_spaces(folder: Path) -> Path:
    """The folder or, if there is white space in its path, a link to it without: torch writes paths unquoted into commands, and Ray
    into those that start its processes."""
    if not re.search(r"\s", str(folder)):
        return folder
    place = tempfile.gettempdir()
    link = Path("/tmp" if re.search(r"\s", place) else place) / f"moeflow-{os.getuid()}-{_digest(str(folder))}"
    if not link.is_symlink() or link.readlink() != folder:
        new = link.with_name(f"{link.name}-{os.getpid()}")
        new.symlink_to(folder)
        new.replace(link)  # another process may be doing the same
    return link


def restart_without_spaces() -> None:
    """Start this process again by a path without white space, if its Python lies at one that has some."""
    prefix, python = Path(sys.prefix), Path(sys.executable)
    link = without_spaces(prefix)
    if link == prefix or not python.is_relative_to(prefix):
        return
    again = link / python.relative_to(prefix)
    os.environ["PATH"] = f"{again.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.execv(again, [str(again), *sys.orig_argv[1:]])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
