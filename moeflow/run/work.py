"""Where a running step writes, and with how many threads it computes. Knows no step and no store."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from threadpoolctl import threadpool_limits

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@contextmanager
def work_folder(root: Path) -> Iterator[Path]:
    """An empty folder below `root` that goes at the end; folders of processes that were killed are swept away."""
    with _door(root):
        _sweep(root)
        folder = Path(tempfile.mkdtemp(prefix="step-", dir=root))
        lock = (folder / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_SH)
    with lock:
        try:
            yield folder
        finally:
            _remove(folder)


@contextmanager
def shared_folder(root: Path, name: str) -> Iterator[Path]:
    """The folder called `name` below `root`: one for all processes that ask for it now, which goes with the last of them."""
    folder = root / f"step-{name}"
    with _door(root):
        folder.mkdir(exist_ok=True)
        lock = (folder / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_SH)
    with lock:
        try:
            yield folder
        finally:
            with _door(root), suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Numerical libraries use `n` threads here: those loaded by now by a call, others by the environment."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, str(n)))
    try:
        with threadpool_limits(limits=n):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _door(root: Path) -> Iterator[None]:
    """One process at a time makes, locks and sweeps folders below `root`: nobody sweeps one that is not yet locked."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as door:
        fcntl.flock(door, fcntl.LOCK_EX)
        yield


def _sweep(root: Path) -> None:
    for folder in root.glob("step-*"):
        try:
            lock = (folder / ".lock").open("rb+")
        except FileNotFoundError:  # its owner is removing it
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            _remove(folder)


def _remove(folder: Path) -> None:
    # The lock file goes last, so that a folder of which only a part was removed is swept by the next who comes.
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()
    shutil.rmtree(folder)
