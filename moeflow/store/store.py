"""Immutable folders by key, on a disk or in S3.

A key leads to a manifest, the manifest to blobs, and a blob is named by the SHA-256 of its bytes, so what a step leaves
untouched is stored once. The manifest is written last, by a conditional create: an artifact is whole or absent, and the
first writer wins. The store knows records of steps, never the steps or how they are run.
"""

import json
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from moeflow.store import names, partial
from moeflow.store.artifact import StoredArtifact
from moeflow.store.blobs import Blobs, open_blobs
from moeflow.store.cache import ELSEWHERE, NodeCache, lost, take, verify
from moeflow.store.errors import CorruptBlob, NotStored, disk
from moeflow.store.home import home
from moeflow.store.index import Index, read_index
from moeflow.store.local import LocalBlobs
from moeflow.store.manifest import File, Manifest, Record
from moeflow.store.names import split_part
from moeflow.store.partial import Snapshot

THREADS = 32
RENEW = 86400  # seconds: what is older is touched when it is relied upon, so that garbage collection sees it used


@dataclass(frozen=True)
class Committed:
    digest: str  # of the artifact that stands, whoever wrote it
    first: bool  # whether this writer did
    bytes_written: int  # bytes of blobs that were not stored yet
    bytes: int  # bytes of all files


@dataclass(frozen=True)
class Store:
    blobs: Blobs
    given_cache: Path | None = None  # None is the usual place, found on the node that asks: this value travels to workers
    cache_limit: int = 0  # bytes; 0 is four fifths of what the disk could give

    @staticmethod
    def open(url: str, cache: str | Path | None = None) -> "Store":
        """The store at a folder or an `s3://` address. Makes no request. Raises ValueError."""
        blobs = open_blobs(str(url))
        return Store(blobs, None if cache is None else Path(cache).expanduser().absolute())

    @property
    def cache(self) -> Path:
        """A folder on this node; safe to delete whenever nothing runs."""
        if self.given_cache is not None:
            return self.given_cache
        return self.blobs.root / "cache" if isinstance(self.blobs, LocalBlobs) else home()

    @property
    def url(self) -> str:
        return self.blobs.url

    @property
    def node(self) -> NodeCache:
        return NodeCache(self.cache, self.cache_limit)

    def check(self) -> None:
        """Fail now where a run would fail in its middle. Raises StoreError."""
        self.blobs.check()
        with disk(self.cache, instead=ELSEWHERE):
            self.cache.mkdir(parents=True, exist_ok=True)

    def index(self, steps: Iterable[str]) -> Index:
        """What is stored of the steps with these names, by a few listings."""
        return read_index(self.blobs, sorted(set(steps)), self.manifests)

    def has(self, key: str) -> bool:
        return self.blobs.exists(names.manifest(split_part(key)[0]))

    def manifest(self, key: str) -> Manifest:
        """Raises NotStored, which is a KeyError, and CorruptBlob."""
        step = split_part(key)[0]
        try:
            return Manifest.load(self.blobs.read(names.manifest(step)))
        except json.JSONDecodeError as error:
            raise CorruptBlob(f"{names.manifest(step)} in {self.url} is cut short; delete it and run again") from error
        except FileNotFoundError:
            raise NotStored(f"{step} is not stored in {self.url}; run the pipeline that makes it, or see `moeflow ls`") from None

    def manifests(self, keys: Iterable[str]) -> dict[str, Manifest]:
        """The manifests of those that are stored, many at a time; the others are left out."""

        def read(key: str) -> Manifest | None:
            try:
                return self.manifest(key)
            except NotStored:
                return None

        asked = [*dict.fromkeys(keys)]
        with ThreadPoolExecutor(THREADS) as pool:
            return {k: m for k, m in zip(asked, pool.map(read, asked), strict=True) if m is not None}

    def commit(self, key: str, folder: Path, *, record: Record, links: Mapping[str, File] | None = None) -> Committed:
        """Store the files of `folder`, and those of other artifacts under the names of `links`, as `key`.

        On a disk the files may become the blobs themselves: from here on `folder` may be deleted but not written to.
        Raises StoreError; then nothing is stored under `key`.
        """
        paths = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if _is_file(p)}
        if both := sorted(paths.keys() & (links or {}).keys()):
            raise ValueError(f"{key}: {both[0]} is both written and linked; do one of them")
        with ThreadPoolExecutor(4) as pool:
            digests = [*pool.map(names.sha256, paths.values())]
        mine = {n: File(d, p.stat().st_size) for (n, p), d in zip(paths.items(), digests, strict=True)}
        new = {f.sha256: (f, paths[n]) for n, f in mine.items()}
        old = {f.sha256: f for f in (links or {}).values() if f.sha256 not in new}
        with ThreadPoolExecutor(8) as pool:
            written = sum(pool.map(lambda item: self._put(*item), new.values()))
            [*pool.map(lambda f: self._rely(f, record), old.values())]
        return self._write(key, dict(sorted({**mine, **(links or {})}.items())), record, written, "")

    def alias(self, key: str, of: str, record: Record) -> Committed:
        """Store what `of` holds under `key` as well, moving no bytes: the recipe differs, the contents cannot."""
        found = self.manifest(of)
        self._renew(names.manifest(of))
        return self._write(key, found.files, record, 0, found.same_as or of)

    def renew(self, keys: Iterable[str], index: Index) -> None:
        """Tell garbage collection that a run relies on these, one request for each that is old."""
        old = [k for k in keys if index.modified.get(k, time.time()) < time.time() - RENEW]
        with ThreadPoolExecutor(THREADS) as pool:
            [*pool.map(lambda k: self.blobs.touch(names.manifest(k)), old)]

    def artifact(self, key: str, prefix: str = "", scratch: Path | None = None) -> StoredArtifact:
        """What is stored under `key` (or "key/prefix"), as a step reads it; `folder()` fills `scratch` where given."""
        step, inside = split_part(key)
        return StoredArtifact(self.blobs, self.node, self.manifest(step), prefix or inside, scratch)

    def fetch(self, key: str, into: Path) -> None:
        """Copy everything to the folder `into`, whole or not at all, verified; the copies are the caller's to change.

        Raises NotStored, CorruptBlob, StoreError, and FileExistsError where `into` holds something.
        """
        manifest, prefix = self.manifest(key), split_part(key)[1]
        if into.is_file() or (into.is_dir() and any(into.iterdir())):
            raise FileExistsError(f"{into} is not empty; name a folder that does not exist yet")
        half = into.absolute().with_name(f".{into.name}.{uuid.uuid4().hex[:8]}.half")
        with disk(into.parent, manifest.bytes, "name a folder elsewhere"):
            half.mkdir(parents=True)
            try:
                with ThreadPoolExecutor(4) as pool:
                    files = [(half / n, f) for n, f in manifest.files.items() if n.startswith(prefix)]
                    [*pool.map(lambda item: self._copy(item[0], item[1], manifest.key), files)]
                if into.is_dir():
                    into.rmdir()
                half.replace(into)
            finally:
                shutil.rmtree(half, ignore_errors=True)

    def save_partial(self, key: str, folder: Path, snapshot: Snapshot | None = None, rank: int = 0) -> None:
        """Keep a copy of `folder` for an interrupted run of `key` to continue from, in place of an earlier one.

        With `snapshot` it is the part that process `rank` of a gang has in it, and `folder` is not to be written to any more.
        """
        if snapshot is None:
            partial.save(self.blobs, key, folder)
        else:
            partial.save_part(self.blobs, key, folder, snapshot, rank)

    def snapshots(self, key: str) -> list[Snapshot]:
        """The partial states of `key` that gangs left whole, newest first."""
        return partial.snapshots(self.blobs, key)

    def load_partial(self, key: str, into: Path, snapshots: Iterable[Snapshot] | None = None) -> bool:
        """Put the newest partial state of `key` into the folder `into`. False when there is none.

        With `snapshots`, the first of them that is whole still, with the parts of all processes.
        """
        if snapshots is None:
            return partial.load(self.blobs, key, into)
        return partial.load_parts(self.blobs, key, snapshots, into)

    def drop_partial(self, key: str) -> None:
        partial.drop(self.blobs, key)

    def _put(self, file: File, path: Path) -> int:
        """Store one blob unless it is; the bytes written."""
        name = names.blob(file.sha256)
        found = self.blobs.stat(name)
        if found is not None and found.size == file.size:  # else it was cut short: write it again
            if found.modified < time.time() - RENEW:
                self.blobs.touch(name)
            return 0
        self.blobs.upload(path, name, take=True)
        return file.size

    def _rely(self, file: File, record: Record) -> None:
        """See that a linked blob is there, and keep it from garbage collection. Raises CorruptBlob."""
        if not self._renew(names.blob(file.sha256)):
            above = self.manifests(split_part(i.key)[0] for i in record.inputs)
            raise lost(self.blobs, file, *(k for k, m in above.items() if file in m.files.values()))

    def _renew(self, name: str) -> bool:
        """Touch what is old; False when there is no such name."""
        found = self.blobs.stat(name)
        if found is not None and found.modified < time.time() - RENEW:
            self.blobs.touch(name)
        return found is not None

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

    def _copy(self, to: Path, file: File, owner: str) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        lies = self.blobs.local(names.blob(file.sha256)) or self.node.has(file)
        if lies is None:
            take(self.blobs, file, to, owner)
            return
        with ThreadPoolExecutor(1) as beside:  # copying waits for the disk, hashing for the processor
            verified = beside.submit(verify, lies, file, self.blobs, owner)
            shutil.copyfile(lies, to)
            verified.result()


def _is_file(path: Path) -> bool:
    """False for folders. Raises ValueError for what would be lost: links to folders or to nothing, pipes."""
    if path.is_file():
        return True
    if path.is_dir() and not path.is_symlink():
        return False
    raise ValueError(f"{path} is neither a file nor a folder of its own; leave a copy in the output instead")
