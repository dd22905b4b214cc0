"""Blobs on this node's disk: fetched once for all its workers, verified on arrival, the longest unused given up first.

What somebody reads has a second name under `open/`, and what has two names is not given up: it would free nothing. The
folder may be deleted whenever nothing runs. Knows no keys and no manifests.
"""

import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from moeflow.store import names
from moeflow.store.blobs import Blobs
from moeflow.store.errors import CorruptBlob, disk
from moeflow.store.local import NO_LINK
from moeflow.store.manifest import File

ELSEWHERE = "point MOEFLOW_CACHE to another disk"
_lock = Lock()
_verified: set[tuple[str, int, int, int]] = set()  # files that this process has read and found right
_open: dict[Path, Path] = {}  # where this process has what it reads, by the `open/` of each cache
_added: dict[Path, int] = {}  # bytes this process brought into each cache since it last looked at the whole of it


@dataclass(frozen=True)
class NodeCache:
    folder: Path
    limit: int = 0  # bytes; 0 is four fifths of what the disk could give

    def link(self, blobs: Blobs, file: File, to: Path, owner: str) -> None:
        """Make `to` a verified, read-only file with these bytes, of the artifact `owner`. Raises CorruptBlob."""
        to.parent.mkdir(parents=True, exist_ok=True)
        name = names.blob(file.sha256)
        if (lies := blobs.local(name)) is not None:
            verify(lies, file, blobs, owner)
            if not _linked(lies, to):
                to.symlink_to(lies)
            return
        cached = self.folder / name
        with disk(self.folder, file.size, ELSEWHERE):
            while True:
                with suppress(FileNotFoundError):  # not there, or given up between two lines
                    os.utime(cached)
                    if not _linked(cached, to):
                        shutil.copyfile(cached, to)  # a symbolic link would not outlive the blob in the cache
                        to.chmod(0o444)
                    return
                with self._locked(file.sha256):
                    if not cached.exists():
                        self._bring(blobs, file, cached, owner)

    def hold(self, blobs: Blobs, file: File, held: Path, owner: str) -> Path:
        """The blob's path, good while `held`, another name of it, is there. Raises CorruptBlob."""
        self.link(blobs, file, held, owner)
        return self.folder / names.blob(file.sha256)

    def has(self, file: File) -> Path | None:
        """The blob's path when this node holds it."""
        cached = self.folder / names.blob(file.sha256)
        return cached if cached.exists() else None

    def open(self) -> "tempfile.TemporaryDirectory[str]":
        """A folder on the cache's disk that goes with the value returned, or once this process has died."""
        with disk(self.folder, instead=ELSEWHERE):
            return tempfile.TemporaryDirectory(dir=_mine(self.folder / "open"))

    def sweep(self) -> None:
        """Remove what workers that died have left open."""
        for lock in (self.folder / "open").glob("*.lock"):
            with lock.open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # whoever opened it lives
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)

    def _bring(self, blobs: Blobs, file: File, cached: Path, owner: str) -> None:
        self._make_room(file.size)
        cached.parent.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=cached.parent, prefix=".half-")
        os.close(handle)
        half = Path(path)
        try:
            take(blobs, file, half, owner)
            half.chmod(0o444)
            half.replace(cached)
        finally:
            half.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Give up the longest unused blobs until `size` more bytes fit under the limit."""
        free = shutil.disk_usage(self.folder).free
        with _lock:
            added = _added.get(self.folder)
            if added is not None and (added + size) * 50 < (self.limit or free):
                _added[self.folder] = added + size  # too little since the last look to look again
                return
            _added[self.folder] = size
        self.sweep()
        held = sorted(self._held())
        total = sum(entry[1] for entry in held)
        limit = self.limit or (free + total) * 4 // 5
        for _, bytes_, path in held:
            if total + size <= limit:
                break
            with suppress(FileNotFoundError):
                if path.stat().st_nlink > 1:  # somebody reads it
                    continue
            path.unlink(missing_ok=True)
            total -= bytes_

    def _held(self) -> Iterator[tuple[float, int, Path]]:
        stale = time.time() - 86400
        for path in (self.folder / "blobs").glob("*/*"):
            with suppress(FileNotFoundError):
                about = path.stat()
                if path.name.startswith(".half-") and about.st_mtime > stale:
                    continue  # somebody is downloading it
                yield about.st_mtime, about.st_size, path

    @contextmanager
    def _locked(self, digest: str) -> Iterator[None]:
        """One download at a time per blob and node. The file system frees the lock of a worker that dies."""
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / digest[:3]).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _mine(opened: Path) -> Path:
    """This process's folder under `open/`. The lock beside it is given back by the system when the process ends."""
    with _lock:
        folder = _open.get(opened)
        if folder is None or not folder.is_dir():  # the cache may have been deleted
            folder = opened / uuid.uuid4().hex
            folder.mkdir(parents=True)
            lock = folder.with_suffix(".new")
            fcntl.flock(os.open(lock, os.O_CREAT | os.O_WRONLY, 0o666), fcntl.LOCK_EX)
            lock.rename(folder.with_suffix(".lock"))  # so that nobody ever finds it unlocked
            _open[opened] = folder
        return folder


def take(blobs: Blobs, file: File, to: Path, owner: str) -> None:
    """Copy a blob to `to` and verify what arrived. Raises CorruptBlob."""
    name = names.blob(file.sha256)
    try:
        blobs.download(name, to)
    except FileNotFoundError:
        raise lost(blobs, file, owner) from None
    if (found := names.sha256(to)) != file.sha256:
        raise rotten(blobs, file, found, owner)


def verify(path: Path, file: File, blobs: Blobs, owner: str) -> None:
    """Read a blob on this machine, once per process, and see that it is what its name says. Raises CorruptBlob."""
    about = path.stat()
    seen = (file.sha256, about.st_ino, about.st_size, about.st_mtime_ns)
    if seen in _verified:
        return
    if (found := names.sha256(path)) != file.sha256:
        raise rotten(blobs, file, found, owner)
    _verified.add(seen)


def rotten(blobs: Blobs, file: File, found: str, owner: str) -> CorruptBlob:
    doomed = f"{names.blob(file.sha256)} and {names.manifest(owner)}"
    return CorruptBlob(f"a file of {owner} holds bytes with digest {found}; delete {doomed} in {blobs.url}, then run again")


def lost(blobs: Blobs, file: File, *owners: str) -> CorruptBlob:
    doomed = " and ".join(names.manifest(o) for o in owners) or "the manifests that name it"
    return CorruptBlob(f"{names.blob(file.sha256)} is gone from {blobs.url}; delete {doomed} there, then run again")


def _linked(path: Path, to: Path) -> bool:
    """Whether the disks allow `to` to be another name of `path`; one that is there already is the same bytes."""
    try:
        os.link(path, to)
    except FileExistsError:
        return True
    except OSError as error:
        if error.errno in NO_LINK:
            return False
        raise
    return True
