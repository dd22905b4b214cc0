"""Where a running step writes, and how many threads it computes with. Knows no step and no store."""

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from threadpoolctl import threadpool_limits

from moeflow.machine import SHARE

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@contextmanager
def work_folder(root: Path) -> Iterator[Path]:
    """An empty folder below `root`, deleted at the end; folders that killed processes left are deleted first."""
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
    """The folder called `name` below `root`: shared by all processes that ask for it now, deleted by the last."""
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
    """Make numerical libraries use `n` threads: loaded ones by a call, others by the environment."""
    loaded = sys.modules.get("torch")  # MKL is a part of it that threadpoolctl does not see
    of_torch = loaded.get_num_threads() if loaded else 0
    try:
        with _environment(dict.fromkeys(THREADS, str(n))), threadpool_limits(limits=n):
            if loaded:
                loaded.set_num_threads(n)
            yield
    finally:
        if loaded:
            loaded.set_num_threads(of_torch)


def part_of_gpu(gpus: float) -> AbstractContextManager[None]:
    """Let what runs know that it has this part of a GPU, if it has less than one (`machine.gpu_share`)."""
    return _environment({SHARE: str(gpus)} if 0 < gpus < 1 else {})


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _door(root: Path) -> Iterator[None]:
    """Let one process at a time make, lock and sweep folders below `root`, so that none is swept before it is locked."""
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
            with suppress(FileNotFoundError):  # its owner deleted it between our opening the lock file and having the lock
                _remove(folder)


def _remove(folder: Path) -> None:
    # The lock file is deleted last, so that the next sweep deletes a folder that was only partly removed.
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()
    shutil.rmtree(folder)
