"""Bytes are compared with what was written before anyone gets them: whole files by SHA-256, ranges by the chunks that they touch.

A chunk is a mebibyte of a file; its fast 64-bit digest stands in the manifest. A file on this machine is hashed once per
process, what arrives over the network every time. Knows no keys.
"""

import hashlib
import os
from pathlib import Path
from threading import Lock

import xxhash

from moeflow.store import names
from moeflow.store.errors import CorruptBlob
from moeflow.store.manifest import CHUNK, WIDTH, File
from moeflow.store.mapped import LEAST, pages

Identity = tuple[str, int, int, int]  # digest, inode, bytes and time of a file on this machine
_intact: dict[Identity, set[int]] = {}  # the chunks of each file that this process has hashed and found intact
_lock = Lock()


def file_of(path: Path) -> File:
    """Read a file once and return its size, its SHA-256 and the digests of its chunks."""
    whole, chunks, size = hashlib.sha256(), [], 0
    with path.open("rb", buffering=0) as opened:
        while data := opened.read(CHUNK):
            whole.update(data)
            chunks.append(xxhash.xxh3_64_hexdigest(data))
            size += len(data)
    return File(whole.hexdigest(), size, "".join(chunks))


def whole(path: Path, file: File) -> None:
    """Compare a file on this machine with its digest, once per process. Raises CorruptBlob, FileNotFoundError."""
    about = path.stat()
    if about.st_size != file.size:
        raise corrupt(file, f"has {about.st_size} bytes instead of {file.size}")
    if (digest := names.sha256_once(path)) != file.sha256:
        raise corrupt(file, f"holds bytes with digest {digest}")


def copy(path: Path, file: File, to: Path) -> None:
    """Copy a file on this machine to the new file `to`, and verify the bytes on their way. Raises CorruptBlob."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as source, to.open("xb", buffering=0) as target:
        while data := source.read(CHUNK):
            digest.update(data)
            target.write(data)
    if digest.hexdigest() != file.sha256:
        raise corrupt(file, f"holds bytes with digest {digest.hexdigest()}")


def piece(path: Path, file: File, start: int, stop: int) -> bytes | memoryview:
    """The bytes [start, stop) of a file on this machine, or if they are many a view of them; each chunk is hashed once per process.

    Raises CorruptBlob, FileNotFoundError.
    """
    with path.open("rb", buffering=0) as opened:
        about = os.fstat(opened.fileno())
        if about.st_size != file.size:
            raise corrupt(file, f"has {about.st_size} bytes instead of {file.size}")
        if not file.chunks:  # written by a version that kept no digests of chunks
            whole(path, file)
            return _exactly(opened.fileno(), start, stop)
        identity = (file.sha256, about.st_ino, about.st_size, about.st_mtime_ns)
        new = {*range(start // CHUNK, -(-stop // CHUNK))} - _intact.get(identity, set())
        # whole chunks, since a digest is of one; of those at the ends that are intact already, no more than is asked for
        begin = start // CHUNK * CHUNK if start // CHUNK in new else start
        end = min(-(-stop // CHUNK) * CHUNK, file.size) if (stop - 1) // CHUNK in new else stop
        view = pages(opened.fileno(), about.st_dev, begin, end)
        data = memoryview(_exactly(opened.fileno(), begin, end)) if view is None else view
        for n in new:
            first, last = n * CHUNK, min((n + 1) * CHUNK, file.size)
            compare(file, first, last, data[first - begin : last - begin])
        if new:
            with _lock:
                _intact.setdefault(identity, set()).update(new)
        asked = data[start - begin : stop - begin]
        return bytes(asked) if stop - start < LEAST else asked  # a few bytes hold no whole chunk in memory


def compare(file: File, start: int, stop: int, data: bytes | memoryview) -> None:
    """Compare the whole chunks [start, stop) with their digests. Raises CorruptBlob."""
    if len(data) != stop - start:
        raise corrupt(file, f"ends {stop - start - len(data)} bytes too early")
    view = memoryview(data)
    for at in range(0, len(data), CHUNK):
        n = (start + at) // CHUNK
        if xxhash.xxh3_64_hexdigest(view[at : at + CHUNK]) != file.chunks[WIDTH * n : WIDTH * (n + 1)]:
            raise corrupt(file, f"holds other bytes than were written, between {n * CHUNK} and {min((n + 1) * CHUNK, file.size)}")


def corrupt(file: File, why: str) -> CorruptBlob:
    return CorruptBlob(f"{names.blob(file.sha256)} {why}", names.blob(file.sha256))


def _exactly(opened: int, start: int, stop: int) -> bytes:
    """Read [start, stop): one call may return less."""
    data = os.pread(opened, stop - start, start)
    while len(data) < stop - start and (more := os.pread(opened, stop - start - len(data), start + len(data))):
        data += more
    return data
