"""A stored folder as a step reads it: files are downloaded on first use, ranges without the rest. Knows no recipes."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from threading import Lock

from moeflow.store import checked, names
from moeflow.store.blobs import Blobs
from moeflow.store.cache import NodeCache, lost
from moeflow.store.manifest import CHUNK, File, Manifest

EDGES = 8  # chunks


class StoredArtifact:
    """Implements `moeflow.step.Artifact`. `reads` counts the bytes that were asked for, each file and range once.

    What is read is verified, whole files and ranges. Files stay on this node while this object lives.
    """

    def __init__(self, blobs: Blobs, cache: NodeCache, manifest: Manifest, prefix: str = "", scratch: Path | None = None) -> None:
        self.manifest, self.prefix, self.reads = manifest, prefix, 0
        self._blobs, self._cache, self._scratch = blobs, cache, scratch
        self.files: Mapping[str, File] = {n: f for n, f in sorted(manifest.files.items()) if n.startswith(prefix)}
        self._asked: set[tuple[str, int, int]] = set()
        self._edges: dict[tuple[str, int], bytes] = {}  # chunks at the ends of ranges, by digest of the file and number
        self._lock = Lock()

    @property
    def key(self) -> str:
        return f"{self.manifest.key}/{self.prefix}" if self.prefix else self.manifest.key

    def names(self) -> list[str]:
        return [*self.files]

    def size(self, name: str) -> int:
        return self._file(name).size

    def file(self, name: str) -> Path:
        file = self._file(name)
        self._count(name, 0, file.size)
        if (path := self._blobs.local(names.blob(file.sha256))) is not None:
            checked.whole(path, file)
            return path
        return self._cache.hold(self._blobs, file, self._opened / file.sha256)

    def read(self, name: str, start: int, stop: int) -> bytes | memoryview:
        file = self._file(name)
        stop = min(stop, file.size)
        self._count(name, start, stop)
        if start >= stop:
            return b""
        if (path := self._blobs.local(names.blob(file.sha256))) is not None:
            return checked.piece(path, file, start, stop)
        if (cached := self._cache.read(file, start, stop)) is not None:
            return cached
        if not file.chunks:  # written by a version that kept no digests of chunks: only the whole file can be verified
            with self.file(name).open("rb") as opened:
                opened.seek(start)
                return opened.read(stop - start)
        return self._fetched(file, start, stop)

    def on_disk(self, name: str) -> bool:
        """Whether one file lies on a disk of this machine where it is read, and is not to be downloaded."""
        return self._blobs.local(names.blob(self._file(name).sha256)) is not None

    def put(self, file: File, fill: Callable[[Path], None], to: str) -> Path:
        """The path of a file beside those of the folder, as `to`, which `fill` writes, verified, if this node does not have it."""
        path = self._folder / to
        if not path.exists():
            self._cache.put(file, fill, path)
        return path

    def folder(self) -> Path:
        missing = {self._folder / n: f for n, f in self.files.items() if not (self._folder / n).exists()}
        for name, file in self.files.items():
            self._count(name, 0, file.size)
        with ThreadPoolExecutor(8) as pool:
            [*pool.map(lambda to: self._cache.link(self._blobs, missing[to], to), missing)]
        self._folder.mkdir(parents=True, exist_ok=True)  # an artifact without files is an empty folder
        return self._folder

    def _fetched(self, file: File, start: int, stop: int) -> bytes:
        """Read a range from elsewhere with the chunks that it touches; the outermost stay for the ranges beside it."""
        first, last = start // CHUNK, (stop - 1) // CHUNK
        with self._lock:
            kept = {n: self._edges[file.sha256, n] for n in (first, last) if (file.sha256, n) in self._edges}
        begin = (first + (first in kept)) * CHUNK
        end = min((last + (last not in kept)) * CHUNK, file.size)
        span = b""
        if begin < end:
            try:
                span = self._blobs.read(names.blob(file.sha256), begin, end)
            except FileNotFoundError:
                raise lost(self._blobs, file) from None
            checked.compare(file, begin, end, span)
        data = kept.get(first, b"") + span + (kept.get(last, b"") if last > first else b"")
        with self._lock:
            for n in (first, last):
                self._edges[file.sha256, n] = data[(n - first) * CHUNK : (n - first + 1) * CHUNK]
            for old in [*self._edges][:-EDGES]:
                del self._edges[old]
        return data[start - first * CHUNK : stop - first * CHUNK]

    @property
    def _folder(self) -> Path:
        return self._scratch or self._opened / "folder"

    @cached_property
    def _opened(self) -> Path:
        self._temporary = self._cache.open()  # deleted together with this object
        return Path(self._temporary.name)

    def _file(self, name: str) -> File:
        if name not in self.files:
            known = ", ".join([*self.files][:20]) + (", ..." if len(self.files) > 20 else "")
            raise FileNotFoundError(f"{self.key} has no file {name!r}; it has: {known or 'none'}")
        return self.files[name]

    def _count(self, name: str, start: int, stop: int) -> None:
        with self._lock:
            whole = (name, 0, self.files[name].size)
            if (name, start, stop) not in self._asked and whole not in self._asked:
                self._asked.add((name, start, stop))
                self.reads += max(0, stop - start)
