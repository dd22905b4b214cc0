"""Immutable folders by key, on a disk or in S3.

A key leads to a manifest, the manifest to blobs, and a blob is named by the SHA-256 of its bytes, so files that a step
leaves unchanged are stored once. The manifest is written last, by a conditional create: an artifact is whole or absent, and the
first writer wins. The store knows records of steps, but neither steps nor runners.
"""

import json
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from moeflow.home import home
from moeflow.store import checked, names
from moeflow.store.artifact import StoredArtifact
from moeflow.store.blobs import Blobs, open_blobs
from moeflow.store.cache import ELSEWHERE, NodeCache, lost, take
from moeflow.store.errors import CorruptBlob, NotStored, disk
from moeflow.store.index import Index, read_index
from moeflow.store.local import LocalBlobs
from moeflow.store.manifest import File, Manifest, Record
from moeflow.store.names import Entry, split_part

THREADS = 32
RENEW = 86400  # seconds: a run touches what it uses if it is older, so that garbage collection sees that it is used


@dataclass(frozen=True)
class Committed:
    digest: str  # of the stored artifact, whoever wrote it
    first: bool  # whether this writer wrote it
    bytes_written: int  # bytes of blobs that were not stored yet
    bytes: int  # bytes of all files
    intact: frozenset[str] = frozenset()  # digests of the blobs that this writer wrote, or read and found right


@dataclass(frozen=True)
class Store:
    blobs: Blobs
    own_cache: Path | None = None  # None: the usual folder of the node that asks, because this value travels to workers
    cache_limit: int = 0  # bytes; 0 means four fifths of the disk's free bytes and the cached ones
    patience: float = 0.0  # seconds that a store or a source which does not answer is waited for

    @staticmethod
    def open(url: str, cache: str | Path | None = None, patience: float = 0.0) -> "Store":
        """Open the store at a folder or an `s3://` address. Makes no request. Raises ValueError."""
        blobs = open_blobs(str(url), patience)
        return Store(blobs, None if cache is None else Path(cache).expanduser().absolute(), patience=patience)

    @property
    def cache(self) -> Path:
        """The cache folder on this node; it may be deleted while nothing runs."""
        if self.own_cache is not None:
            return self.own_cache
        return self.blobs.root / "cache" if isinstance(self.blobs, LocalBlobs) else home()

    @property
    def url(self) -> str:
        return self.blobs.url

    @property
    def node(self) -> NodeCache:
        return NodeCache(self.cache, self.cache_limit)

    def look(self) -> None:
        """Fail now if nothing could be read. Raises StoreError."""
        self.blobs.look()

    def check(self) -> None:
        """Fail now if a run would fail in the middle. Raises StoreError."""
        self.blobs.check()
        with disk(self.cache, instead=ELSEWHERE):
            self.cache.mkdir(parents=True, exist_ok=True)

    def index(self, steps: Iterable[str]) -> Index:
        """What is stored of the steps with these names, in a few listing requests."""
        return read_index(self.blobs, sorted(set(steps)), self.manifests)

    def has(self, key: str) -> bool:
        return self.blobs.stat(names.manifest(split_part(key)[0])) is not None

    def manifest(self, key: str) -> Manifest:
        """Read the manifest of `key`. Raises NotStored, which is a KeyError, and CorruptBlob."""
        step = split_part(key)[0]
        try:
            manifest = Manifest.load(self.blobs.read(names.manifest(step)))
            if manifest.key != step:
                raise ValueError(f"it is that of {manifest.key!r}")
            return manifest
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            why = "is cut short" if isinstance(error, json.JSONDecodeError) else f"is damaged ({error})"
            raise CorruptBlob(f"{names.manifest(step)} in {self.url} {why}", names.manifest(step)) from error
        except FileNotFoundError:
            raise NotStored(f"{step} is not stored in {self.url}; run the pipeline that makes it, or see `moeflow ls`") from None

    def manifests(self, keys: Iterable[str]) -> dict[str, Manifest]:
        """Read many manifests in parallel; keys that are not stored are left out."""

        def read(key: str) -> Manifest | None:
            try:
                return self.manifest(key)
            except NotStored:
                return None

        asked = [*dict.fromkeys(keys)]
        with ThreadPoolExecutor(THREADS) as pool:
            return {k: m for k, m in zip(asked, pool.map(read, asked), strict=True) if m is not None}

    def commit(self, key: str, folder: Path, *, record: Record, links: Mapping[str, File] | None = None) -> Committed:
        """Store the files of `folder`, and the files of other artifacts in `links` by their new names, as `key`.

        On a disk the files themselves may become blobs: afterwards `folder` may be deleted but not written to.
        Raises ValueError and StoreError; then nothing is stored under `key`.
        """
        paths = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if _is_file(p)}
        if both := sorted(paths.keys() & (links or {}).keys()):
            raise ValueError(f"{key}: {both[0]} is both written and linked; do one of them")
        if odd := [n for n in (*paths, *(links or {})) if not n.isprintable()]:
            raise ValueError(f"{key}: no folder can take a file named {odd[0]!r}; give it another name")
        with ThreadPoolExecutor(4) as pool:
            mine = dict(zip(paths, pool.map(checked.file_of, paths.values()), strict=True))
        new = {f.sha256: (f, paths[n]) for n, f in mine.items()}
        old = {f.sha256: f for f in (links or {}).values() if f.sha256 not in new}
        with ThreadPoolExecutor(8) as pool:
            written = dict(zip(new, pool.map(lambda item: self._put(*item), new.values()), strict=True))
            [*pool.map(self._rely, old.values())]
        made = self._write(key, dict(sorted({**mine, **(links or {})}.items())), record, sum(written.values()), "")
        # a blob elsewhere that was there already is believed: whoever publishes it reads it first (`repair.confirm`)
        here = (d for d in (*new, *old) if written.get(d) or self.blobs.local(names.blob(d)) is not None)
        return replace(made, intact=frozenset(here))

    def alias(self, key: str, of: str, record: Record) -> Committed:
        """Store the contents of `of` under `key` as well, without copying: the recipe differs, the contents do not."""
        original = self.manifest(of)
        self._renewed(names.manifest(of))
        record = replace(record, stands_for=original.stands_for)
        return self._write(key, original.files, record, 0, original.same_as or of)

    def renew(self, keys: Iterable[str], index: Index) -> None:
        """Tell garbage collection that a run uses these keys, with one request for each old one."""
        old = [k for k in keys if index.modified.get(k, time.time()) < time.time() - RENEW]
        with ThreadPoolExecutor(THREADS) as pool:
            [*pool.map(lambda k: self.blobs.touch(names.manifest(k)), old)]

    def artifact(self, key: str, prefix: str = "", scratch: Path | None = None) -> StoredArtifact:
        """The artifact `key` (or "key/prefix") as a step reads it; `folder()` fills `scratch` if not None. Raises NotStored."""
        step, inside = split_part(key)
        return StoredArtifact(self.blobs, self.node, self.manifest(step), prefix or inside, scratch)

    def fetch(self, key: str, into: Path) -> None:
        """Copy all files to the folder `into`, all or none, and verify them; the caller may change the copies.

        Raises NotStored, CorruptBlob, StoreError, and FileExistsError if `into` is not empty.
        """
        manifest, prefix = self.manifest(key), split_part(key)[1]
        if into.is_file() or (into.is_dir() and any(into.iterdir())):
            raise FileExistsError(f"{into} is not empty; name a folder that does not exist yet")
        with arriving(into, manifest.bytes, "name a folder elsewhere") as half, ThreadPoolExecutor(4) as pool:
            files = [(half / n, f) for n, f in manifest.files.items() if n.startswith(prefix)]
            [*pool.map(lambda item: self._copy(*item), files)]

    def _put(self, file: File, path: Path) -> int:
        """Store one blob unless it is stored; return the bytes written."""
        name = names.blob(file.sha256)
        entry = self._renewed(name)
        if entry is not None and entry.size == file.size and self._intact(file):  # else it was damaged: write it again
            return 0
        self.blobs.upload(path, name, take=True)
        return file.size

    def _intact(self, file: File) -> bool:
        """Whether a stored blob holds the right bytes; one that is not on this machine is believed to."""
        path = self.blobs.local(names.blob(file.sha256))
        try:
            if path is not None:
                checked.whole(path, file)
        except (CorruptBlob, FileNotFoundError):
            return False
        return True

    def _rely(self, file: File) -> None:
        """Check that a linked blob is stored, on a disk also intact, and protect it from deletion. Raises CorruptBlob."""
        name = names.blob(file.sha256)
        if self._renewed(name) is None:
            raise lost(self.blobs, file)
        if (path := self.blobs.local(name)) is not None:
            checked.whole(path, file)

    def _renewed(self, name: str) -> Entry | None:
        """Touch `name` if it is old; return what was listed of it, None if it does not exist."""
        entry = self.blobs.stat(name)
        if entry is not None and entry.modified < time.time() - RENEW:
            self.blobs.touch(name)
        return entry

    def _write(self, key: str, files: Mapping[str, File], record: Record, written: int, same_as: str) -> Committed:
        about = {f.name: getattr(record, f.name) for f in fields(Record)}
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        manifest = Manifest(**about, key=key, files=files, created=now, same_as=same_as, writer=uuid.uuid4().hex[:8])
        first = self.blobs.create(names.manifest(key), manifest.dump())
        if not first:
            manifest = self.manifest(key)
        marker = names.marker(key, manifest.content, manifest.digest, manifest.source, manifest.bytes)
        self.blobs.create(marker, b"")
        return Committed(manifest.digest, first, written, manifest.bytes)

    def _copy(self, to: Path, file: File) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        local = self.blobs.local(names.blob(file.sha256)) or self.node.has(file)
        if local is None:
            take(self.blobs, file, to)
        else:
            checked.copy(local, file, to)


@contextmanager
def arriving(into: Path, need: int = 0, instead: str = "pass another --store") -> Iterator[Path]:
    """A folder to fill, which takes the place of `into` at the end, all or nothing. Raises StoreError as `disk` does."""
    half = into.absolute().with_name(f".{into.name}.{uuid.uuid4().hex[:8]}.half")
    with disk(into.parent, need, instead):
        half.mkdir(parents=True)
        try:
            yield half
            if into.is_dir():
                into.rmdir()
            half.replace(into)
        finally:
            shutil.rmtree(half, ignore_errors=True)


def _is_file(path: Path) -> bool:
    """Whether `path` is a file, not a folder. Raises ValueError for links to folders or to nothing and for pipes."""
    if path.is_file():
        return True
    if path.is_dir() and not path.is_symlink():
        return False
    raise ValueError(f"{path} is neither a file nor a folder of its own; leave a copy in the output instead")
