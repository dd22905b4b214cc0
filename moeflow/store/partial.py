"""What an interrupted step continues from: snapshots of a folder under the step's key; the newest whole one counts.

Files that did not change since the last snapshot are not written again. Nothing here is part of an artifact.
"""

import json
import shutil
import time
import uuid
from pathlib import Path

from moeflow.store import names
from moeflow.store.blobs import Blobs
from moeflow.store.errors import disk

_digests: dict[tuple[str, int, int, int], str] = {}  # of files this process has hashed for a snapshot


def save(blobs: Blobs, key: str, folder: Path) -> None:
    files = {p.relative_to(folder).as_posix(): _digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    held = {e.name for e in blobs.list(f"partial/{key}/")}
    for name, digest in files.items():
        if _at(key, digest) not in held:
            blobs.upload(folder / name, _at(key, digest))
    # Two workers may save the same step at once (one of them given up for lost): the later snapshot counts.
    snapshot = f"partial/{key}/{time.time_ns():020d}.json"
    blobs.create(snapshot, json.dumps(files).encode())
    kept = {snapshot, *(_at(key, d) for d in files.values())}
    blobs.delete(name for name in held if name not in kept)


def load(blobs: Blobs, key: str, into: Path) -> bool:
    snapshots = sorted((e.name for e in blobs.list(f"partial/{key}/") if e.name.endswith(".json")), reverse=True)
    return any(_loaded(blobs, key, snapshot, into) for snapshot in snapshots)


def drop(blobs: Blobs, key: str) -> None:
    blobs.delete([e.name for e in blobs.list(f"partial/{key}/")])


def _loaded(blobs: Blobs, key: str, snapshot: str, into: Path) -> bool:
    """False where a file is gone or is not what it was: then an older snapshot, or a fresh start, serves."""
    half = into.with_name(f".{into.name}.{uuid.uuid4().hex[:8]}.half")
    with disk(into.parent):
        half.mkdir(parents=True)
        try:
            for name, digest in json.loads(blobs.read(snapshot)).items():
                path = half / name
                path.parent.mkdir(parents=True, exist_ok=True)
                blobs.download(_at(key, digest), path)
                if names.sha256(path) != digest:
                    return False
            if into.is_dir():
                into.rmdir()
            half.replace(into)
        except FileNotFoundError:
            return False
        finally:
            shutil.rmtree(half, ignore_errors=True)
    return True


def _at(key: str, digest: str) -> str:
    return f"partial/{key}/files/{digest}"


def _digest(path: Path) -> str:
    about = path.stat()
    seen = (str(path), about.st_ino, about.st_size, about.st_mtime_ns)
    if seen not in _digests:
        _digests[seen] = names.sha256(path)
    return _digests[seen]
