"""Named bytes that are written once: the interface between a store and the place that keeps its bytes.

It has two implementations: a folder (`local.py`) and a bucket (`s3.py`). Neither knows what the bytes mean.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from moeflow.store.address import parse_s3
from moeflow.store.local import LocalBlobs
from moeflow.store.names import Entry
from moeflow.store.s3 import S3Blobs

__all__ = ["Blobs", "Entry", "LocalBlobs", "S3Blobs", "open_blobs"]


class Blobs(Protocol):
    """A frozen value that can be pickled: workers on other machines open their own connections."""

    @property
    def url(self) -> str:
        """The address of the bytes, as `open_blobs` reads it."""

    def stat(self, name: str) -> Entry | None:
        """Size and modification time, or None if there is no such name."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes [start, stop), without `stop` to the end. Raises FileNotFoundError."""

    def download(self, name: str, path: Path) -> None:
        """Copy the bytes to `path`; the caller may change them. Raises FileNotFoundError, and OSError for the disk of `path`."""

    def upload(self, path: Path, name: str, *, take: bool = False) -> None:
        """Store the file, whole or not at all. With `take` the file itself may become the blob (and read-only)."""

    def create(self, name: str, data: bytes) -> bool:
        """Write `data` if `name` is free; return whether it was."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """List everything whose name begins with `prefix`."""

    def delete(self, names: Iterable[str]) -> None:
        """Delete these names in bulk; names that do not exist are ignored."""

    def touch(self, name: str) -> None:
        """Set the modification time, which garbage collection reads, to now. Raises FileNotFoundError."""

    def now(self) -> float:
        """The time there, which the modification times are of: seconds since the epoch. Raises StoreError."""

    def local(self, name: str) -> Path | None:
        """The path of the blob if it is on a disk of this machine, else None."""

    def sweep(self, before: float) -> None:
        """Delete unfinished uploads that began before that time (seconds since the epoch)."""

    def look(self) -> None:
        """Test that the place is there and may be read. Raises StoreError."""

    def check(self) -> None:
        """Test before a run what would otherwise fail in the middle of it. Raises StoreError."""


def open_blobs(url: str, patience: float = 0.0) -> Blobs:
    """A folder path, or `s3://bucket/prefix?endpoint=..&addressing=path&checksum=when_required&region=..`. Raises ValueError.

    `patience`: seconds that a server which does not answer is waited for; a disk of a server that is away waits by itself.
    """
    if url.startswith("s3://"):
        at = parse_s3(url)
        return S3Blobs(at.bucket, at.prefix, **at.options, patience=patience)
    if "://" in url:
        raise ValueError(f"store {url!r}: know folders and s3://bucket/prefix; for another kind mount it as a folder")
    if not url:
        raise ValueError("store '': give a folder or s3://bucket/prefix")
    return LocalBlobs(Path(url).expanduser().absolute())
