"""What is recorded about an artifact: its files by digest, and how it was made. Does no I/O."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from moeflow.store.names import digest_of

Bytes = bytes  # the class below has a property of that name


@dataclass(frozen=True)
class File:
    """One file of an artifact; its bytes are the blob with this digest."""

    sha256: str
    size: int  # bytes


@dataclass(frozen=True)
class Input:
    key: str  # of a step, or "step/prefix" for a part
    digest: str  # of its contents


@dataclass(frozen=True, kw_only=True)
class Record:
    """How an artifact was made, as far as its runner knows."""

    step: str
    version: int
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Input, ...] = ()
    content: str = ""  # the key of this recipe on inputs with these contents
    source: str = ""  # digest of the function's source
    libraries: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0
    reads: int = 0  # bytes read from the inputs


@dataclass(frozen=True, kw_only=True)
class Manifest(Record):
    key: str
    files: Mapping[str, File]
    created: str  # UTC, ISO 8601
    same_as: str = ""  # the key that has the same files, if nothing was computed
    writer: str = ""  # a random word, so that no two writers write the same bytes

    @cached_property
    def digest(self) -> str:
        """The digest of the contents, whatever recipe made them."""
        return part_digest(self, "")

    @cached_property
    def bytes(self) -> int:
        """The bytes of all files."""
        return sum(f.size for f in self.files.values())

    def dump(self) -> Bytes:
        return json.dumps(asdict(self) | {"digest": self.digest, "bytes": self.bytes}, indent=1).encode()

    @staticmethod
    def load(data: Bytes) -> "Manifest":
        """Read what `dump` wrote. Raises ValueError if a file's name would leave the artifact's folder."""
        raw = json.loads(data)
        known = {f.name: raw[f.name] for f in fields(Manifest) if f.name in raw}
        files = {}
        for name, file in raw["files"].items():
            if name.startswith("/") or ".." in name.split("/"):
                raise ValueError(f"manifest {raw['key']}: file name {name!r} leaves the folder; do not use this store")
            files[name] = File(**file)
        inputs = tuple(Input(**i) for i in raw["inputs"])
        return Manifest(**known | {"files": files, "inputs": inputs, "notes": tuple(raw["notes"])})


def part_digest(manifest: Manifest, prefix: str) -> str:
    """The digest of the files whose names begin with `prefix`: the contents of an input that is a part."""
    return digest_of({name: file.sha256 for name, file in manifest.files.items() if name.startswith(prefix)})
