"""Blobs on this node's disk: downloaded once for all its workers, verified on arrival, least recently used evicted first.

A blob that a step reads has a second hard link under `open/`, and a blob with two links is not evicted: that would free
nothing. The folder may be deleted while nothing runs. Knows no keys and no manifests.
"""

import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from moeflow.store import checked, names
from moeflow.store.blobs import Blobs
from moeflow.store.errors import CorruptBlob, disk
from moeflow.store.local import linked
from moeflow.store.manifest import File

ELSEWHERE = "point MOEFLOW_CACHE to another disk"
_lock = Lock()
_open: dict[Path, Path] = {}  # this process's folder of open files, by the `open/` of each cache
_added: dict[Path, int] = {}  # bytes that this process added to each cache since it last measured all of it


@dataclass(frozen=True)
class NodeCache:
    folder: Path
    limit: int = 0  # bytes; 0 means four fifths of the disk's free bytes and the cached ones

    def link(self, blobs: Blobs, file: File, to: Path) -> None:
        """Make `to` a verified, read-only copy or link of `file`. Raises CorruptBlob, StoreError."""
        to.parent.mkdir(parents=True, exist_ok=True)
        name = names.blob(file.sha256)
        if (path := blobs.local(name)) is not None:
            checked.whole(path, file)
            if not linked(path, to):
                to.symlink_to(path)
            return
        self.put(file, lambda half: take(blobs, file, half), to)

    def put(self, file: File, fill: Callable[[Path], None], to: Path) -> None:
        """As `link`, of a file that `fill` writes, verified, where this node does not have it."""
        cached = self.folder / names.blob(file.sha256)
        to.parent.mkdir(parents=True, exist_ok=True)
        with disk(self.folder, file.size, ELSEWHERE):
            while True:
                with suppress(FileNotFoundError):  # not cached yet, or evicted between two lines
                    self._check(file)
                    os.utime(cached)
                    if not linked(cached, to):
                        shutil.copyfile(cached, to)  # a symbolic link would break when the blob is evicted
                        to.chmod(0o444)
                    return
                with self._locked(file.sha256):
                    if not cached.exists():
                        self._bring(file, fill, cached)

    def hold(self, blobs: Blobs, file: File, pin: Path) -> Path:
        """The path of the cached blob, which stays while `pin`, a second link to it, exists. Raises CorruptBlob, StoreError."""
        self.link(blobs, file, pin)
        return self.folder / names.blob(file.sha256)

    def has(self, file: File) -> Path | None:
        """The path of the cached blob, verified; None if this node does not have it."""
        with suppress(FileNotFoundError):
            return self._check(file)
        return None

    def read(self, file: File, start: int, stop: int) -> bytes | memoryview | None:
        """The verified bytes [start, stop) of the cached blob; None if this node does not have it."""
        cached = self.folder / names.blob(file.sha256)
        try:
            return checked.piece(cached, file, start, stop)
        except FileNotFoundError:
            return None
        except CorruptBlob:
            cached.unlink(missing_ok=True)  # the store may still have the right bytes
            return None

    def open(self) -> "tempfile.TemporaryDirectory[str]":
        """A folder on the cache's disk, deleted with the returned object, or by `sweep` after this process has died."""
        with disk(self.folder, instead=ELSEWHERE):
            return tempfile.TemporaryDirectory(dir=_mine(self.folder / "open"))

    def sweep(self) -> None:
        """Delete the folders of open files of workers that died."""
        for lock in (self.folder / "open").glob("*.lock"):
            with lock.open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # its process is alive
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)

    def _check(self, file: File) -> Path:
        """The path of the cached blob; if it holds other bytes it is deleted. Raises FileNotFoundError."""
        cached = self.folder / names.blob(file.sha256)
        try:
            checked.whole(cached, file)
        except CorruptBlob as error:
            cached.unlink(missing_ok=True)
            raise FileNotFoundError(str(cached)) from error
        return cached

    def _bring(self, file: File, fill: Callable[[Path], None], cached: Path) -> None:
        self._make_room(file.size)
        cached.parent.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=cached.parent, prefix=".half-")
        os.close(handle)
        half = Path(path)
        try:
            fill(half)
            half.chmod(0o444)
            half.replace(cached)
        finally:
            half.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Evict the least recently used blobs until `size` more bytes fit under the limit."""
        free = shutil.disk_usage(self.folder).free
        with _lock:
            added = _added.get(self.folder)
            if added is not None and (added + size) * 50 < (self.limit or free):
                _added[self.folder] = added + size  # too little was added to measure again
                return
            _added[self.folder] = size
        self.sweep()
        cached = sorted(self._cached())
        total = sum(entry[1] for entry in cached)
        limit = self.limit or (free + total) * 4 // 5
        for _, bytes_, path in cached:
            if total + size <= limit:
                break
            with suppress(FileNotFoundError):
                if path.stat().st_nlink > 1:  # a step is reading it
                    continue
            path.unlink(missing_ok=True)
            total -= bytes_

    def _cached(self) -> Iterator[tuple[float, int, Path]]:
        stale = time.time() - 86400
        for path in (self.folder / "blobs").glob("*/*"):
            with suppress(FileNotFoundError):
                about = path.stat()
                if path.name.startswith(".half-") and about.st_mtime > stale:
                    continue  # a worker is downloading it
                yield about.st_mtime, about.st_size, path

    @contextmanager
    def _locked(self, digest: str) -> Iterator[None]:
        """Allow one download of a blob at a time on this node. The system releases the lock of a worker that dies."""
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / digest[:3]).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _mine(opened: Path) -> Path:
    """This process's folder under `open/`. The system releases the lock beside it when the process ends."""
    with _lock:
        folder = _open.get(opened)
        if folder is None or not folder.is_dir():  # the cache may have been deleted
            folder = opened / uuid.uuid4().hex
            folder.mkdir(parents=True)
            lock = folder.with_suffix(".new")
            fcntl.flock(os.open(lock, os.O_CREAT | os.O_WRONLY, 0o666), fcntl.LOCK_EX)
            lock.rename(folder.with_suffix(".lock"))  # locked before it gets this name: `sweep` never sees it unlocked
            _open[opened] = folder
        return folder


def take(blobs: Blobs, file: File, to: Path) -> None:
    """Copy a blob to `to` and verify the copy. Raises CorruptBlob."""
    try:
        blobs.download(names.blob(file.sha256), to)
    except FileNotFoundError:
        raise lost(blobs, file) from None
    checked.whole(to, file)


def lost(blobs: Blobs, file: File) -> CorruptBlob:
    return checked.corrupt(file, f"is gone from {blobs.url}")
