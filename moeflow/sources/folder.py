"""Sources on this machine: a folder, a file, a glob, or the running Python's standard library, pinned by SHA-256.

Digests are cached by path, size, time and inode, so that a folder that has not changed is pinned without reading it. Those of a
large file's chunks are computed by the same read, so that its ranges can be verified wherever they are read.
"""

import glob
import hashlib
import json
import os
import re
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from moeflow.home import home
from moeflow.sources.absent import advice
from moeflow.sources.places import Grow, Kind, Pinned, SourceFile, changed, chosen, copy, piece
from moeflow.store import checked
from moeflow.store.errors import MissingSource
from moeflow.store.manifest import CHUNK, WIDTH, File

BY_PARTS = False
STDLIB = "python:stdlib"
RACY = 2.0  # seconds: a younger file may change again without a new modification time
NOTES, CHUNKS = "digests.json", "chunks"  # a file of digests, and a folder with the chunks' digests of each large file
DIGEST = re.compile(r"[0-9a-f]{64}")
REMEMBERED = 50_000  # digests
WILD = set("*?[")


def pin(uri: str, kind: Kind) -> Pinned:
    root, inside, left = _files_at(uri, kind)
    if not inside:
        raise MissingSource(f"{uri}: there are no such files; check the path")
    for name in inside:
        _check(root, name, kind)
    digests = digests_of(root / n for n in inside)
    files = (SourceFile(n, (root / n).stat().st_size, f"sha256:{d}") for n, d in zip(inside, digests, strict=True))
    return Pinned(STDLIB if uri.startswith(STDLIB) else root.as_posix(), "", tuple(files), left)


def read(uri: str, file: SourceFile, start: int, stop: int) -> bytes:
    path = local(uri, file)
    if file.chunks:
        with _forgotten(path):
            return piece(path, file, start, stop)
    [digest] = digests_of([path])
    _compare(path, file, digest)
    with path.open("rb") as opened:
        opened.seek(start)
        return opened.read(max(0, stop - start))


def bring(uri: str, file: SourceFile, to: Path, grow: Grow, start: int, stop: int) -> None:
    path, digest = local(uri, file), hashlib.sha256()
    copy(path, to, grow, digest.update)
    _compare(path, file, digest.hexdigest())


def stays(uri: str, file: SourceFile) -> bool:
    return True


def known(uri: str, file: SourceFile) -> SourceFile:
    path = local(uri, file)
    about = file_at(path)
    _compare(path, file, about.sha256)
    return replace(file, sha256=about.sha256, chunks=about.chunks)


def file_at(path: Path) -> File:
    """The digests of a file and of its chunks; one that has not changed since it was digested is not read again."""
    [digest] = digests_of([path])
    size = path.stat().st_size
    try:
        chunks = (home() / CHUNKS / digest).read_text()
    except (OSError, ValueError):
        chunks = ""
    if re.fullmatch(rf"[0-9a-f]{{{WIDTH * -(-size // CHUNK)}}}", chunks):
        return File(digest, size, chunks)
    return _digested(path)


def digests_of(paths: Iterable[Path]) -> list[str]:
    """The SHA-256 of each file; only files that are new or have changed are read."""
    asked = [*paths]
    known = _remembered()
    stats = [p.stat() for p in asked]
    marks = [f"{p}\0{s.st_size}\0{s.st_mtime_ns}\0{s.st_ino}" for p, s in zip(asked, stats, strict=True)]
    new = {at: p for at, p in zip(marks, asked, strict=True) if at not in known}
    with ThreadPoolExecutor(2) as pool:
        learnt = dict(zip(new, pool.map(lambda p: _digested(p).sha256, new.values()), strict=True))
    old = {at: s.st_mtime < time.time() - RACY for at, s in zip(marks, stats, strict=True)}
    if keep := {at: d for at, d in learnt.items() if old[at]}:
        _remember(keep)
    return [known.get(at) or learnt[at] for at in marks]


def _files_at(uri: str, kind: Kind) -> tuple[Path, list[str], tuple[str, ...]]:
    """A folder, the names of the files in it, and what is left there. Raises MissingSource if there is no such folder or file."""
    if uri.startswith(STDLIB):
        root, pattern = Path(sysconfig.get_paths()["stdlib"]), uri.removeprefix(STDLIB).lstrip("/") or "*.py"
        # _sysconfigdata records how this Python was built, which differs from machine to machine
        return root, sorted(p.name for p in root.glob(pattern) if p.is_file() and not p.name.startswith("_sysconfigdata")), ()
    path = Path(uri).expanduser().absolute()
    if path.is_file():
        if kind == "model":
            raise MissingSource(f"{path} is a file; a model is the folder that holds it: {path.parent}")
        return path.parent, [path.name], ()
    if path.is_dir():
        try:
            inside = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir())
        except PermissionError as error:
            raise MissingSource(f"{error.filename}: no permission to list it; make it readable") from None
        return path, *chosen(inside, kind, str(path))
    if not WILD & set(uri):
        raise MissingSource(f"{path}: there is no such file or folder; {advice(Path(uri).expanduser())}")
    fixed = Path(*[part for i, part in enumerate(path.parts) if not any(WILD & set(p) for p in path.parts[: i + 1])])
    inside = glob.glob(path.relative_to(fixed).as_posix(), root_dir=fixed, recursive=True)
    return fixed, sorted(n for n in inside if (fixed / n).is_file()), ()


def _check(root: Path, name: str, kind: Kind) -> None:
    """Raise MissingSource unless this is a file that can be read and, of a model, that does not lie elsewhere.

    In the hub's own cache a file is a link from `snapshots/REVISION` to `blobs` beside it.
    """
    path = root / name
    if path.is_symlink() and not path.exists():
        raise MissingSource(f"{path} is a link to {str(path.readlink())!r}, which is not there; fetch the file again")
    if not path.is_file():
        raise MissingSource(f"{path} is no file but a pipe, a socket or a device; put a copy of the file in its place")
    if not os.access(path, os.R_OK):
        raise MissingSource(f"{path}: no permission to read it; make it readable")
    inside = [root.resolve(), *([root.resolve().parents[1] / "blobs"] if root.resolve().parent.name == "snapshots" else [])]
    if kind == "model" and not any(path.resolve().is_relative_to(folder) for folder in inside):
        raise MissingSource(f"{path} is a link out of the model's folder, to {str(path.resolve())!r}; put a copy in its place")


def local(uri: str, file: SourceFile) -> Path:
    root = Path(sysconfig.get_paths()["stdlib"]) if uri == STDLIB else Path(uri)
    path = root / file.name
    if not path.is_file():
        raise MissingSource(f"{path} is not on this machine; put it on a disk that all machines share, or in S3")
    return path


def _compare(path: Path, file: SourceFile, digest: str) -> None:
    """Raise MissingSource unless this is the digest that the file was pinned with."""
    if f"sha256:{digest}" != file.pin:
        with _forgotten(path):
            raise changed(str(path), file.pin, f"sha256:{digest}")


@contextmanager
def _forgotten(path: Path) -> Iterator[None]:
    """Forget the digests of a file that turns out to hold other bytes, whatever its time says: the next run pins what is there."""
    try:
        yield
    except MissingSource:
        _note({at: d for at, d in _remembered().items() if not at.startswith(f"{path}\0")})
        raise


def _digested(path: Path) -> File:
    """Read a file; keep the digests of its chunks if it is large."""
    made = checked.file_of(path)
    if made.size > CHUNK:
        _write(home() / CHUNKS / made.sha256, made.chunks)
    return made


def _remembered() -> dict[str, str]:
    try:
        digests = json.loads((home() / NOTES).read_bytes())
    except (OSError, ValueError, RecursionError):  # none yet, or cut short: every digest can be computed again
        return {}
    known = digests.items() if isinstance(digests, dict) else ()
    return {at: d for at, d in known if isinstance(d, str) and DIGEST.fullmatch(d)}


def _remember(learnt: dict[str, str]) -> None:
    _note(dict([*(_remembered() | learnt).items()][-REMEMBERED:]))


def _note(digests: dict[str, str]) -> None:
    _write(home() / NOTES, json.dumps(digests))


def _write(path: Path, text: str) -> None:
    with suppress(OSError):  # if the home cannot be written to, the files are read again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, half = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(half, path)
