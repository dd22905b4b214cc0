"""Files of a step's output that are not written: a note says of which bytes of the step's inputs each consists, and where they lie.

The inputs are those of the artifact that is read, not of the run that wrote the note. So a note leads to where the bytes lie now
after a source has moved, or has been copied where it was referred to, and nothing was computed again.
"""

import base64
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock

from moeflow.sources import referred
from moeflow.step import Artifact
from moeflow.store import CorruptBlob, File, MissingSource, Store, checked
from moeflow.store.artifact import StoredArtifact

ENDING = ".elsewhere.json"
"""Behind the name of a file that lies elsewhere, in the name of its note."""
AT_ONCE = 64 << 20

Piece = tuple[int, str, int, int]
"""The number of an input, the name of a file in it, and the bytes [start, stop) of that file."""


@dataclass(frozen=True)
class Elsewhere:
    """A file that consists of a `head` and of pieces of the inputs, one after the other."""

    size: int  # bytes
    sha256: str
    head: bytes
    pieces: tuple[Piece, ...]

    def dump(self) -> bytes:
        return json.dumps(asdict(self) | {"head": base64.b64encode(self.head).decode()}).encode()

    @staticmethod
    def load(data: bytes) -> "Elsewhere":
        """Read what `dump` wrote; its bytes have been compared with what was written."""
        raw = json.loads(data)
        pieces = tuple((i, name, start, stop) for i, name, start, stop in raw["pieces"])
        return Elsewhere(raw["size"], raw["sha256"], base64.b64decode(raw["head"]), pieces)

    @staticmethod
    def of(path: Path, head: int, pieces: Iterable[Piece]) -> "Elsewhere":
        """The file at `path`, whose bytes behind the first `head` are those of the pieces. Neighbours become one piece."""
        joined: list[Piece] = []
        for i, name, start, stop in pieces:
            if joined and joined[-1][:2] == (i, name) and joined[-1][3] == start:
                start = joined.pop()[2]
            joined.append((i, name, start, stop))
        with path.open("rb") as file:
            first = file.read(head)
        made = checked.file_of(path)
        if head + sum(stop - start for _, _, start, stop in joined) != made.size:
            raise ValueError(f"{path.name} has {made.size} bytes, which are not those of its pieces")
        return Elsewhere(made.size, made.sha256, first, tuple(joined))

    def between(self, start: int, stop: int) -> Iterator[bytes | Piece]:
        """What the bytes [start, stop) consist of."""
        at = len(self.head)
        if start < at:
            yield self.head[start:stop]
        for i, name, first, last in self.pieces:
            low, high = max(start, at), min(stop, at + last - first)
            if low < high:
                yield i, name, first + low - at, first + high - at
            at += last - first


def written(file: Elsewhere, folder: Path, name: str) -> None:
    """Put a file into an output by its note alone."""
    (folder / (name + ENDING)).write_bytes(file.dump())


def is_note(name: str) -> bool:
    """Whether a file of an artifact stands for one that lies elsewhere."""
    return name == referred.NOTE or name.endswith(ENDING)


class Seen:
    """An artifact some of whose files lie elsewhere, as a step reads it: with these files in the place of their notes."""

    def __init__(self, store: Store, stored: StoredArtifact, notes: Iterable[str]) -> None:
        self.key, self.files = stored.key, stored.files
        self._store, self._stored, self._notes = store, stored, [*notes]
        self._read, self._of_notes = 0, 0
        self._asked, self._lock = set[tuple[str, int, int]](), Lock()

    @cached_property
    def elsewhere(self) -> dict[str, Elsewhere]:
        """The files that lie elsewhere, by name."""
        read = {n.removesuffix(ENDING): bytes(self._stored.read(n, 0, self._stored.size(n))) for n in self._notes}
        self._of_notes = sum(map(len, read.values()))
        return {name: Elsewhere.load(data) for name, data in read.items()}

    @property
    def reads(self) -> int:
        """The bytes that were asked for, each range once; the notes themselves do not count."""
        return self._read + self._stored.reads - self._of_notes

    def names(self) -> list[str]:
        return sorted([*self.elsewhere, *(n for n in self._stored.names() if not n.endswith(ENDING))])

    def size(self, name: str) -> int:
        return self.elsewhere[name].size if name in self.elsewhere else self._stored.size(name)

    def read(self, name: str, start: int, stop: int) -> bytes | memoryview:
        if name not in self.elsewhere:
            return self._stored.read(name, start, stop)
        stop = min(stop, self.elsewhere[name].size)
        self._count(name, start, stop)
        parts = self.elsewhere[name].between(start, stop)
        return b"".join(p if isinstance(p, bytes) else self._inputs[p[0]].read(*p[1:]) for p in parts)

    def file(self, name: str) -> Path:
        if name not in self.elsewhere:
            return self._stored.file(name)
        lies = self.elsewhere[name]
        self._count(name, 0, lies.size)  # also where this node has it
        return self._stored.put(File(lies.sha256, lies.size), lambda to: self.copy(name, to), name)

    def folder(self) -> Path:
        folder = self._stored.folder()
        for name in self.elsewhere:
            (folder / (name + ENDING)).unlink(missing_ok=True)
            self.file(name)
        return folder

    def on_disk(self, name: str) -> bool:
        """Whether one file lies on a disk of this machine where it is read, and is not to be downloaded."""
        if name not in self.elsewhere:
            return self._stored.on_disk(name)
        return all(self._inputs[i].on_disk(of) for i, of in {piece[:2] for piece in self.elsewhere[name].pieces})

    def copy(self, name: str, to: Path) -> None:
        """Write one of the files that lie elsewhere. Raises MissingSource if its bytes are no longer those that it had."""
        file = self.elsewhere[name]
        with to.open("wb") as out:
            for at in range(0, file.size, AT_ONCE):
                out.write(self.read(name, at, at + AT_ONCE))
        try:
            checked.whole(to, File(file.sha256, file.size))
        except CorruptBlob:
            to.unlink()
            raise MissingSource(f"{name} of {self.key} is made of bytes that have changed since{referred.WAY_OUT}") from None

    def _count(self, name: str, start: int, stop: int) -> None:
        with self._lock:
            if not {(name, start, stop), (name, 0, self.elsewhere[name].size)} & self._asked:
                self._asked.add((name, start, stop))
                self._read += max(0, stop - start)

    @cached_property
    def _inputs(self) -> "list[StoredArtifact | Seen | referred.Referred]":
        counted_here = referred.Count()
        return [referred.opened(seen(self._store, i.key), counted_here) for i in self._stored.manifest.inputs]


@dataclass(frozen=True)
class Single:
    """One file of an artifact, read like a folder that has no other."""

    artifact: Artifact
    name: str

    def names(self) -> list[str]:
        return [self.name]

    def size(self, name: str) -> int:
        return self.artifact.size(name)

    def read(self, name: str, start: int, stop: int) -> bytes | memoryview:
        return self.artifact.read(name, start, stop)


def weights(artifact: Artifact, name: str) -> Path | Single:
    """One file, to be read tensor by tensor: its path, but where it lies on a disk already and is no file of its own."""
    if isinstance(artifact, Seen) and name in artifact.elsewhere and artifact.on_disk(name):
        return Single(artifact, name)
    return artifact.file(name)


def seen(store: Store, key: str, scratch: Path | None = None) -> StoredArtifact | Seen:
    """The artifact `key` as a step reads it; `folder()` fills `scratch` if not None. Raises NotStored."""
    stored = store.artifact(key, scratch=scratch)
    notes = [n for n in stored.names() if n.endswith(ENDING)]
    return Seen(store, stored, notes) if notes else stored
