"""What an interrupted step continues from: snapshots under the step's key; the newest complete one counts.

A step alone saves a folder. Each process of a gang saves a part, and the gang's snapshot is complete once all parts are
stored; only then are older ones deleted. Files that did not change since the last snapshot are not written again. Nothing here is
part of an artifact.
"""

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moeflow.store import names
from moeflow.store.store import Store, arriving

THREADS = 8
_PART = re.compile(r"partial/[^/]+/(?P<attempt>[0-9a-f]+)/(?P<rank>\d+)/(?P<at>\d+)-of-(?P<processes>\d+)\.json")


@dataclass(frozen=True, order=True)
class Snapshot:
    """The state that a gang of `processes`, started as `attempt` (hexadecimal), saved at its step `at`."""

    at: int
    attempt: str
    processes: int

    def part(self, key: str, rank: int) -> str:
        return f"{_of(key, self.attempt, rank)}{self.at:020d}-of-{self.processes}.json"


def save(store: Store, key: str, folder: Path) -> None:
    """Save a copy of `folder`, in place of an earlier one that no gang saved."""
    # Two workers may save the same step at once (if one was taken for lost): the later snapshot counts.
    snapshot = f"partial/{key}/{time.time_ns():020d}.json"
    existing, kept = _put(store, f"partial/{key}/", folder, snapshot, take=False)
    store.blobs.delete(name for name in existing - kept if _gang(name) is None)


def save_part(store: Store, key: str, folder: Path, snapshot: Snapshot, rank: int) -> None:
    """Save the files of `folder` as the part of process `rank`; if that completes the snapshot, delete what it replaces.

    On a disk the files may become the store's own: afterwards `folder` may be deleted but not written to.
    """
    mine = _of(key, snapshot.attempt, rank)
    existing, kept = _put(store, mine, folder, snapshot.part(key, rank), take=True)
    whole = [s for s in snapshots(store, key) if s.attempt == snapshot.attempt]
    if not whole:
        return
    # A process deletes only files of its own: those of others may still be uploading.
    for name in existing:
        if (match := _PART.fullmatch(name)) and int(match["at"]) >= whole[0].at:
            with suppress(FileNotFoundError):  # a gang of the same step that got further deleted it
                kept |= {name, *_files(store, mine, name).values()}
    store.blobs.delete(existing - kept)
    if rank == 0:
        _supersede(store, key, whole[0])


def snapshots(store: Store, key: str) -> list[Snapshot]:
    """The complete snapshots of gangs, newest first."""
    ranks: dict[Snapshot, set[int]] = defaultdict(set)
    for entry in store.blobs.list(f"partial/{key}/"):
        if match := _PART.fullmatch(entry.name):
            ranks[Snapshot(int(match["at"]), match["attempt"], int(match["processes"]))].add(int(match["rank"]))
    return sorted((s for s, saved in ranks.items() if len(saved) == s.processes), reverse=True)


def load(store: Store, key: str, into: Path) -> bool:
    """Copy the newest folder that a step alone saved to `into`; return False if there is none."""
    own = f"partial/{key}/"
    saved = sorted((n for e in store.blobs.list(own) if (n := e.name).endswith(".json") and _gang(n) is None), reverse=True)
    return any(_loaded(store, {name: own}, into) for name in saved)


def load_parts(store: Store, key: str, candidates: Iterable[Snapshot], into: Path) -> bool:
    """Copy all parts of the first candidate that is still complete into the folder `into`; return False if none is.

    Raises ValueError if two processes saved different files under one name.
    """
    return any(_loaded(store, {s.part(key, r): _of(key, s.attempt, r) for r in range(s.processes)}, into) for s in candidates)


def drop(store: Store, key: str) -> None:
    store.blobs.delete([e.name for e in store.blobs.list(f"partial/{key}/")])


def _put(store: Store, own: str, folder: Path, snapshot: str, *, take: bool) -> tuple[set[str], set[str]]:
    """Store `folder` as `snapshot`, its files below `own`; return the names that were there before, and the snapshot's."""
    files = {p.relative_to(folder).as_posix(): names.sha256_once(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    existing = {e.name for e in store.blobs.list(own)}
    for name, digest in files.items():
        if _at(own, digest) not in existing:
            store.blobs.upload(folder / name, _at(own, digest), take=take)
    store.blobs.create(snapshot, json.dumps(files).encode())
    return existing, {snapshot, *(_at(own, d) for d in files.values())}


def _supersede(store: Store, key: str, newest: Snapshot) -> None:
    """Delete what earlier gangs saved, except those that got further."""
    further = {s.attempt for s in snapshots(store, key) if s.at > newest.at} | {newest.attempt}
    left = [e.name for e in store.blobs.list(f"partial/{key}/")]
    store.blobs.delete(n for n in left if (attempt := _gang(n)) is not None and attempt not in further)


def _loaded(store: Store, parts: Mapping[str, str], into: Path) -> bool:
    """Copy the files of `parts` (a part's name: the prefix of its files) to the folder `into`.

    Returns False if a file is missing or has other bytes: then an older snapshot, or a fresh start, has to do.
    """
    try:
        with arriving(into) as half, ThreadPoolExecutor(THREADS) as pool:
            files: dict[str, str] = {}  # by name: the blob
            for part, own in parts.items():
                for name, at in _files(store, own, part).items():
                    if _sha256(files.setdefault(name, at)) != _sha256(at):
                        raise ValueError(f"two processes of a gang saved different files as {name!r}; give each names of its own")
            [*pool.map(lambda item: _fetch(store, item[1], half / item[0]), files.items())]
    except FileNotFoundError:
        return False
    return True


def _fetch(store: Store, blob: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    store.blobs.download(blob, path)
    if names.sha256(path) != _sha256(blob):
        raise FileNotFoundError(f"{blob} holds other bytes than were saved")


def _files(store: Store, own: str, part: str) -> dict[str, str]:
    """The files of a part: the blob by file name."""
    return {name: _at(own, digest) for name, digest in json.loads(store.blobs.read(part)).items()}


def _of(key: str, attempt: str, rank: int) -> str:
    return f"partial/{key}/{attempt}/{rank:05d}/"


def _gang(name: str) -> str | None:
    """The attempt that saved it; None if a step alone did."""
    inside = name.split("/")[2:]
    return inside[0] if len(inside) > 1 and inside[0] != "files" else None


def _at(own: str, digest: str) -> str:
    return f"{own}files/{digest}"


def _sha256(blob: str) -> str:
    return blob.rpartition("/")[2]
