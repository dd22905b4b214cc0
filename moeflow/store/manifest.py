"""What is recorded about an artifact: its files by digest, and how it was made. Does no I/O."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from moeflow.store.names import digest_of

CHUNK = 1 << 20  # bytes of a file that have a digest of their own
WIDTH = 16  # hexadecimal digits of that digest
Bytes = bytes  # the class below has a property of that name
KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("key", "step", "content", "source", "created", "same_as", "writer", "digest"), (str,)),
    **dict.fromkeys(("version", "reads"), (int,)),
    **dict.fromkeys(("params", "libraries", "files", "stands_for", "operations", "machine"), (dict,)),
    **dict.fromkeys(("inputs", "notes"), (list,)), "seconds": (int, float),
}  # fmt: skip
"""The types that the fields of a manifest have in JSON."""


@dataclass(frozen=True)
class File:
    """One file of an artifact; its bytes are the blob with this digest."""

    sha256: str
    size: int  # bytes
    chunks: str = ""  # the digests of its chunks, one after another; see checked.py


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
    reads: int = 0  # bytes read from the inputs, or from a source
    operations: Mapping[str, int] = field(default_factory=dict)  # by its spec; of a gang, those of each process
    machine: Mapping[str, Any] = field(default_factory=dict)  # gpu, as its driver calls it, or ""; threads; loaded
    stands_for: Mapping[str, str] = field(default_factory=dict)  # of a note: the files elsewhere, by name with their SHA-256


@dataclass(frozen=True, kw_only=True)
class Manifest(Record):
    key: str
    files: Mapping[str, File]
    created: str  # UTC, ISO 8601
    same_as: str = ""  # the key that has the same files, if nothing was computed
    writer: str = ""  # a random word, so that no two writers write the same bytes

    @cached_property
    def digest(self) -> str:
        """The digest of the contents, whatever recipe made them; of a note, that of the files elsewhere."""
        return part_digest(self, "")

    @cached_property
    def bytes(self) -> int:
        """The bytes of all files."""
        return sum(f.size for f in self.files.values())

    def dump(self) -> Bytes:
        return json.dumps(asdict(self) | {"digest": self.digest, "bytes": self.bytes}, indent=1).encode()

    @staticmethod
    def load(data: Bytes) -> "Manifest":
        """Read what `dump` wrote. Raises ValueError, KeyError, TypeError or AttributeError if it is something else."""
        raw = json.loads(data)
        for name, kinds in KINDS.items():
            if name in raw and type(raw[name]) not in kinds:
                raise ValueError(f"its {name} is {raw[name]!r:.60}")
        known = {f.name: raw[f.name] for f in fields(Manifest) if f.name in raw}
        files = {name: _file(name, File(**file)) for name, file in raw["files"].items()}
        inputs = tuple(Input(**i) for i in raw["inputs"])
        texts = (*raw["notes"], *raw.get("stands_for", {}).values(), raw["key"], *(s for i in inputs for s in (i.key, i.digest)))
        if odd := [n for n in texts if type(n) is not str]:
            raise ValueError(f"it has {odd[0]!r:.60} where a text belongs")
        manifest = Manifest(**known | {"files": files, "inputs": inputs, "notes": tuple(raw["notes"])})
        if raw["digest"] != manifest.digest:
            raise ValueError(f"its digest is {raw['digest']!r}, that of its files {manifest.digest}")
        return manifest


def _file(name: str, file: File) -> File:
    """The file as it is. Raises ValueError if its name leaves the artifact's folder or a figure is not one."""
    if not name or name.startswith("/") or {"", ".", ".."} & {*name.split("/")} or not name.isprintable():
        raise ValueError(f"the file name {name!r} leaves the folder, or no folder can take it")
    if not re.fullmatch(r"[0-9a-f]{64}", file.sha256):
        raise ValueError(f"file {name!r}: sha256 is {file.sha256!r}, not 64 hexadecimal digits")
    if type(file.size) is not int or file.size < 0:
        raise ValueError(f"file {name!r}: size is {file.size!r}, not a number of bytes")
    if file.chunks and not re.fullmatch(rf"[0-9a-f]{{{WIDTH * -(-file.size // CHUNK)}}}", file.chunks):
        raise ValueError(f"file {name!r}: chunks are not 16 hexadecimal digits for each mebibyte")
    return file


def part_digest(manifest: Manifest, prefix: str) -> str:
    """The digest of the files whose names begin with `prefix`, the contents of an input that is a part; of a note, of the files
    elsewhere."""
    digests = manifest.stands_for or {name: file.sha256 for name, file in manifest.files.items()}
    return digest_of({name: sha256 for name, sha256 in digests.items() if name.startswith(prefix)})
