"""Files of a source that are not copied into the store: an artifact has a note of where one lies, and its ranges are read there."""

import json
from dataclasses import asdict, dataclass
from typing import Protocol, TypeVar

from moeflow.sources.places import SourceFile
from moeflow.sources.where import place_of
from moeflow.step import Artifact
from moeflow.store.errors import MayPass, MissingSource

NOTE = "source.json"
A = TypeVar("A", bound=Artifact)
WAY_OUT = "; with -p source=copy the store keeps a copy, which no change and no move of the source can touch"


@dataclass(frozen=True)
class Note:
    """Where a pinned file lies."""

    uri: str
    file: SourceFile

    def dump(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @staticmethod
    def load(data: bytes) -> "Note":
        """Read what `dump` wrote; its bytes have been compared with what was written."""
        raw = json.loads(data)
        return Note(raw["uri"], SourceFile(**raw["file"]))


class Counts(Protocol):
    """What counts the bytes that are read: `moeflow.step.Context` is such."""

    reads: int


@dataclass
class Count:
    """A count of bytes."""

    reads: int = 0


@dataclass(frozen=True)
class Referred:
    """The file that a note describes, read like an artifact with this one file."""

    note: Note
    context: Counts

    def names(self) -> list[str]:
        return [self.note.file.name]

    def size(self, name: str) -> int:
        return self.note.file.size

    def on_disk(self, name: str) -> bool:
        """Whether the file lies on a disk of this machine. Raises MissingSource if it should, and is gone."""
        return place_of(self.note.uri).local(self.note.uri, self.note.file) is not None

    def read(self, name: str, start: int, stop: int) -> bytes | memoryview:
        """The bytes [start, stop). Raises MissingSource, with the way out, if the source has changed or moved."""
        try:
            data = place_of(self.note.uri).read(self.note.uri, self.note.file, start, stop)
        except MayPass:
            raise
        except MissingSource as error:
            raise MissingSource(f"{error}{WAY_OUT}") from error
        if len(data) != stop - start:
            raise MissingSource(f"{name} at {self.note.uri} ended after {len(data)} of {stop - start} bytes{WAY_OUT}")
        self.context.reads += len(data)
        return data


def is_reference(artifact: Artifact) -> bool:
    """Whether the artifact is a note of a source's file."""
    return artifact.names() == [NOTE]


def opened(artifact: A, context: Counts) -> A | Referred:
    """What an artifact is a note of, or the artifact itself if it holds the files."""
    if not is_reference(artifact):
        return artifact
    return Referred(Note.load(bytes(artifact.read(NOTE, 0, artifact.size(NOTE)))), context)
