"""The names of a store's objects, and the digests in them. Makes no requests."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeflow.step import canonical

_digests: dict[tuple[str, int, int, int], str] = {}  # of files that this process has read


@dataclass(frozen=True)
class Entry:
    """One line of a listing."""

    name: str
    size: int  # bytes
    modified: float  # seconds since the epoch


def blob(sha256: str) -> str:
    return f"blobs/{sha256[:2]}/{sha256}"


def manifest(key: str) -> str:
    return f"manifests/{key}.json"


def key_of(name: str) -> str:
    """The key whose manifest has this name."""
    return name.removeprefix("manifests/").removesuffix(".json")


def marker(key: str, content: str, digest: str, source: str, size: int) -> str:
    """The name of an empty object, which tells a listing what is in the manifest without reading that."""
    return f"found/{key}/{content.rpartition('-')[2] or '0'}-{digest}-{source[:8] or '0'}-{size}"


def digest_of(files: Mapping[str, str]) -> str:
    """The digest of a folder, from the SHA-256 of each file by name: 32 hex digits, like keys."""
    return hashlib.sha256(b"moeflow.files/1\n" + canonical(dict(files))).hexdigest()[:32]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """The SHA-256 of a file, which this process reads again only if size, modification time or inode have changed."""
    about = path.stat()
    identity = (str(path), about.st_ino, about.st_size, about.st_mtime_ns)
    if identity not in _digests:
        _digests[identity] = sha256(path)
    return _digests[identity]


def split_part(key: str) -> tuple[str, str]:
    """Split `key` or `key/prefix` into the step's key and the prefix."""
    step, _, prefix = key.partition("/")
    return step, prefix
