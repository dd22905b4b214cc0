"""Named bytes in a folder: whole files, hard-linked instead of copied if possible. Knows no manifests."""

import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from moeflow.store.errors import StoreError, disk
from moeflow.store.names import Entry

NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class LocalBlobs:
    root: Path

    @property
    def url(self) -> str:
        return str(self.root)

    def stat(self, name: str) -> Entry | None:
        try:
            with disk(self.root):
                about = (self.root / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat.S_ISREG(about.st_mode):
            return None
        return Entry(name, about.st_size, about.st_mtime)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with disk(self.root), (self.root / name).open("rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else max(0, stop - start))

    def download(self, name: str, path: Path) -> None:
        shutil.copyfile(self.root / name, path)

    def upload(self, path: Path, name: str, *, take: bool = False) -> None:
        target = self.root / name
        with self._half(path.stat().st_size) as half:
            # A file with other hard links, or behind a symbolic link, may be used elsewhere too: copy it.
            if not (take and not path.is_symlink() and path.stat().st_nlink == 1 and linked(path, half)):
                shutil.copyfile(path, half)
            _flush(half)  # or a manifest could outlive, after a power failure, the bytes that it names
            half.chmod(0o444)
            os.utime(half)  # garbage collection counts its age from now
            _beneath(target, lambda: half.replace(target))

    def create(self, name: str, data: bytes) -> bool:
        target = self.root / name
        with self._half(len(data)) as half:
            try:
                half.write_bytes(data)
                _beneath(target, lambda: os.link(half, target))  # unlike replace, link refuses a name that is taken
            except FileExistsError:
                return False
        return True

    def list(self, prefix: str) -> Iterator[Entry]:
        above, _, stem = prefix.rpartition("/")
        with disk(self.root):
            yield from self._walk(above, stem)

    def delete(self, names: Iterable[str]) -> None:
        with disk(self.root):
            for name in names:
                path = self.root / name
                path.unlink(missing_ok=True)
                if path.parent != self.root:
                    with suppress(OSError):  # not empty, or filled by another process meanwhile
                        path.parent.rmdir()

    def touch(self, name: str) -> None:
        with disk(self.root):
            os.utime(self.root / name)

    def now(self) -> float:
        try:
            with self._half(0) as half:
                half.touch()  # the disk may be another machine's
                return half.stat().st_mtime
        except StoreError:  # the folder may only be read
            return time.time()

    def local(self, name: str) -> Path | None:
        path = self.root / name
        return path if path.is_file() else None

    def sweep(self, before: float) -> None:
        self.delete([e.name for e in self.list("halves/") if e.modified < before])

    def look(self) -> None:
        with disk(self.root):
            if self.root.exists() and not self.root.is_dir():
                raise StoreError(f"store {self.root} is a file; give a folder or s3://bucket/prefix")

    def check(self) -> None:
        self.look()
        try:
            if self.create("probe", b"") and self.create("probe", b""):
                raise StoreError(f"the disk under {self.root} lets two writers have one name; use another folder or S3")
        except NotADirectoryError as error:
            raise StoreError(f"store {self.root} lies under a file; give a folder or s3://bucket/prefix") from error
        except OSError as error:
            if error.errno in NO_LINK:
                raise StoreError(f"the disk under {self.root} knows no hard links; use another folder or S3") from error
            what = f"{self.root} cannot be made or written to ({error.strerror or error})"
            raise StoreError(f"store {what}; give a folder or s3://bucket/prefix") from error

    @contextmanager
    def _half(self, size: int) -> Iterator[Path]:
        """A new path, on the same disk, for a file of `size` bytes that is not complete yet; what is left there is deleted."""
        with disk(self.root, size):
            half = self.root / "halves" / uuid.uuid4().hex
            half.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield half
            finally:
                half.unlink(missing_ok=True)

    def _walk(self, folder: str, stem: str) -> Iterator[Entry]:
        try:
            entries = sorted(os.scandir(self.root / folder), key=lambda e: e.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if not entry.name.startswith(stem):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(name, "")
                continue
            with suppress(FileNotFoundError):  # deleted since the folder was read
                about = entry.stat()
                yield Entry(name, about.st_size, about.st_mtime)


def _beneath(target: Path, put: Callable[[], object]) -> None:
    """Create `target` by calling `put`; try again if another process deletes its folder because that is empty."""
    for _ in range(8):
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            put()
            return
    put()


def _flush(path: Path) -> None:
    """Wait until the disk holds the file's bytes."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def linked(path: Path, to: Path) -> bool:
    """Hard-link `to` to `path`; False if the disks do not allow it. If `to` exists, it has the same bytes already."""
    try:
        os.link(path, to)
    except FileExistsError:
        return True
    except OSError as error:
        if error.errno in NO_LINK:
            return False
        raise
    return True
