"""Named bytes that are written once: what a store asks of the place that holds it.

Two places keep this promise: a folder (`local.py`) and a bucket (`s3.py`). Neither knows what the bytes mean.
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
    """A frozen value that pickles: workers on other machines open their own connections."""

    @property
    def url(self) -> str:
        """Where the bytes are, as `open_blobs` takes it."""

    def exists(self, name: str) -> bool: ...

    def stat(self, name: str) -> Entry | None:
        """Size and age, or None when there is no such name."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes [start, stop). Raises FileNotFoundError."""

    def download(self, name: str, path: Path) -> None:
        """A copy at `path`, which its owner may write to. Raises FileNotFoundError, and OSError where `path` lies."""

    def upload(self, path: Path, name: str, *, take: bool = False) -> None:
        """Put the file there, whole or not at all. With `take` the file may become the blob itself (and read-only)."""

    def create(self, name: str, data: bytes) -> bool:
        """Write `data` if `name` is free; say whether it was."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """Everything whose name begins with `prefix`."""

    def delete(self, names: Iterable[str]) -> None:
        """Remove them, in bulk; names that are gone are fine."""

    def touch(self, name: str) -> None:
        """Renew the age that garbage collection looks at. Raises FileNotFoundError."""

    def local(self, name: str) -> Path | None:
        """The file itself where it lies on this machine's disk already, else None."""

    def sweep(self, before: float) -> None:
        """Give up uploads that were begun before that time (seconds since the epoch) and never finished."""

    def check(self) -> None:
        """Ask before a run what would fail in the middle of it. Raises StoreError."""


def open_blobs(url: str) -> Blobs:
    """A folder path, or `s3://bucket/prefix?endpoint=..&addressing=path&checksum=when_required&region=..`."""
    if url.startswith("s3://"):
        at = parse_s3(url)
        return S3Blobs(at.bucket, at.prefix, **at.options)
    if "://" in url:
        raise ValueError(f"store {url!r}: know folders and s3://bucket/prefix; for another kind mount it as a folder")
    if not url:
        raise ValueError("store '': give a folder or s3://bucket/prefix")
    return LocalBlobs(Path(url).expanduser().absolute())
