"""Files of a source that are not copied into the store: an artifact has a note of where one lies, and its ranges are read there."""

import json
from dataclasses import asdict, dataclass

from moeflow.sources.places import SourceFile
from moeflow.sources.where import place_of
from moeflow.step import Artifact, Context
from moeflow.store.errors import MayPass, MissingSource

NOTE = "source.json"
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


@dataclass(frozen=True)
class Referred:
    """The file that a note describes, read like an artifact with this one file, by a running step."""

    note: Note
    context: Context

    def names(self) -> list[str]:
        return [self.note.file.name]

    def size(self, name: str) -> int:
        return self.note.file.size

    def read(self, name: str, start: int, stop: int) -> bytes:
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


def opened(artifact: Artifact, context: Context) -> Artifact | Referred:
    """What an artifact is a note of, or the artifact itself if it holds the files."""
    if artifact.names() != [NOTE]:
        return artifact
    return Referred(Note.load(artifact.read(NOTE, 0, artifact.size(NOTE))), context)
