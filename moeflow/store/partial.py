"""What an interrupted step continues from: snapshots under the step's key, of which the newest whole one counts.

A step alone leaves a folder. A gang leaves a part for each of its processes, and its snapshot is whole once all parts are
there; what is older goes only then. Files that did not change since the last snapshot are not written again. Nothing here is
part of an artifact.
"""

import json
import re
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moeflow.store import names
from moeflow.store.blobs import Blobs
from moeflow.store.errors import disk

THREADS = 8
_PART = re.compile(r"partial/[^/]+/(?P<attempt>[0-9a-f]+)/(?P<rank>\d+)/(?P<at>\d+)-of-(?P<processes>\d+)\.json")
_digests: dict[tuple[str, int, int, int], str] = {}  # of files this process has hashed for a snapshot


@dataclass(frozen=True, order=True)
class Snapshot:
    """What the gang that was started as `attempt` (hexadecimal), of so many processes, kept at its step `at`."""

    at: int
    attempt: str
    processes: int

    def part(self, key: str, rank: int) -> str:
        return f"{_of(key, self.attempt, rank)}{self.at:020d}-of-{self.processes}.json"


def save(blobs: Blobs, key: str, folder: Path) -> None:
    """Keep a copy of `folder`, in place of an earlier one that no gang made."""
    # Two workers may save the same step at once (one of them given up for lost): the later snapshot counts.
    snapshot = f"partial/{key}/{time.time_ns():020d}.json"
    held, kept = _put(blobs, f"partial/{key}/", folder, snapshot, take=False)
    blobs.delete(name for name in held - kept if _gang(name) is None)


def save_part(blobs: Blobs, key: str, folder: Path, snapshot: Snapshot, rank: int) -> None:
    """Keep the files of `folder` as the part of process `rank`; where the snapshot is whole then, what it replaces goes.

    On a disk the files may become the store's own: from here on `folder` may be deleted but not written to.
    """
    mine = _of(key, snapshot.attempt, rank)
    held, kept = _put(blobs, mine, folder, snapshot.part(key, rank), take=True)
    whole = [s for s in snapshots(blobs, key) if s.attempt == snapshot.attempt]
    if not whole:
        return
    # Of its own files each process knows which are needed; those of another may be on their way.
    for name in held:
        if (found := _PART.fullmatch(name)) and int(found["at"]) >= whole[0].at:
            with suppress(FileNotFoundError):  # another gang of the same step that came further took it away
                kept |= {name, *_files(blobs, mine, name).values()}
    blobs.delete(held - kept)
    if rank == 0:
        _supersede(blobs, key, whole[0])


def snapshots(blobs: Blobs, key: str) -> list[Snapshot]:
    """The snapshots of gangs that are whole, newest first."""
    ranks: dict[Snapshot, set[int]] = defaultdict(set)
    for entry in blobs.list(f"partial/{key}/"):
        if found := _PART.fullmatch(entry.name):
            ranks[Snapshot(int(found["at"]), found["attempt"], int(found["processes"]))].add(int(found["rank"]))
    return sorted((s for s, seen in ranks.items() if len(seen) == s.processes), reverse=True)


def load(blobs: Blobs, key: str, into: Path) -> bool:
    """Put the newest folder that a step alone left into `into`; False where there is none."""
    own = f"partial/{key}/"
    found = sorted((n for e in blobs.list(own) if (n := e.name).endswith(".json") and _gang(n) is None), reverse=True)
    return any(_loaded(blobs, {name: own}, into) for name in found)


def load_parts(blobs: Blobs, key: str, candidates: Iterable[Snapshot], into: Path) -> bool:
    """Put all parts of the first candidate that is whole still into the one folder `into`; False where none is.

    Raises ValueError where two processes left different files of one name.
    """
    return any(_loaded(blobs, {s.part(key, r): _of(key, s.attempt, r) for r in range(s.processes)}, into) for s in candidates)


def drop(blobs: Blobs, key: str) -> None:
    blobs.delete([e.name for e in blobs.list(f"partial/{key}/")])


def _put(blobs: Blobs, own: str, folder: Path, snapshot: str, *, take: bool) -> tuple[set[str], set[str]]:
    """Store `folder` as `snapshot` with its files below `own`; what lay there before, and what the snapshot consists of."""
    files = {p.relative_to(folder).as_posix(): _digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    held = {e.name for e in blobs.list(own)}
    for name, digest in files.items():
        if _at(own, digest) not in held:
            blobs.upload(folder / name, _at(own, digest), take=take)
    blobs.create(snapshot, json.dumps(files).encode())
    return held, {snapshot, *(_at(own, d) for d in files.values())}


def _supersede(blobs: Blobs, key: str, newest: Snapshot) -> None:
    """Remove what earlier gangs left, but for those that came further."""
    further = {s.attempt for s in snapshots(blobs, key) if s.at > newest.at} | {newest.attempt}
    left = [e.name for e in blobs.list(f"partial/{key}/")]
    blobs.delete(n for n in left if (attempt := _gang(n)) is not None and attempt not in further)


def _loaded(blobs: Blobs, parts: Mapping[str, str], into: Path) -> bool:
    """`parts`: each part's name, and below what its files lie.

    False where a file is gone or is not what it was: then an older snapshot, or a fresh start, serves.
    """
    half = into.with_name(f".{into.name}.{uuid.uuid4().hex[:8]}.half")
    with disk(into.parent):
        half.mkdir(parents=True)
        try:
            files: dict[str, str] = {}  # by name: the blob
            for part, own in parts.items():
                for name, at in _files(blobs, own, part).items():
                    if _sha256(files.setdefault(name, at)) != _sha256(at):
                        raise ValueError(f"two processes of a gang saved different files as {name!r}; give each names of its own")
            with ThreadPoolExecutor(THREADS) as pool:
                right = pool.map(lambda item: _fetched(blobs, item[1], half / item[0]), files.items())
                if not all([*right]):
                    return False
            if into.is_dir():
                into.rmdir()
            half.replace(into)
        except FileNotFoundError:
            return False
        finally:
            shutil.rmtree(half, ignore_errors=True)
    return True


def _fetched(blobs: Blobs, blob: str, path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    blobs.download(blob, path)
    return names.sha256(path) == _sha256(blob)


def _files(blobs: Blobs, own: str, part: str) -> dict[str, str]:
    """What a part consists of: by name, the blob."""
    return {name: _at(own, digest) for name, digest in json.loads(blobs.read(part)).items()}


def _of(key: str, attempt: str, rank: int) -> str:
    return f"partial/{key}/{attempt}/{rank:05d}/"


def _gang(name: str) -> str | None:
    """The attempt that left it; None for what a step alone left."""
    inside = name.split("/")[2:]
    return inside[0] if len(inside) > 1 and inside[0] != "files" else None


def _at(own: str, digest: str) -> str:
    return f"{own}files/{digest}"


def _sha256(blob: str) -> str:
    return blob.rpartition("/")[2]


def _digest(path: Path) -> str:
    about = path.stat()
    seen = (str(path), about.st_ino, about.st_size, about.st_mtime_ns)
    if seen not in _digests:
        _digests[seen] = names.sha256(path)
    return _digests[seen]
