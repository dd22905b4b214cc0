"""The steps that bring pinned sources into the store: one step per large file, so that every file that has arrived is kept.

A file is verified against its pin while it is copied. A large file in S3 comes in parts, which survive the loss of a worker. A file
that stays where it is need not come: `reference` stores a note of where it lies, through which its ranges are read.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from shutil import copyfileobj, move

from moeflow.sources.places import SourceFile
from moeflow.sources.referred import NOTE, Note
from moeflow.sources.where import place_of
from moeflow.step import Context, Spec, Step, step, step_of
from moeflow.store.errors import MissingSource

PART = 2 << 30  # bytes of a large file after which an interrupted run continues
MEMORY = 256 << 20  # bytes


def _one(*, uri: str, name: str, size: int, pin: str) -> Spec:
    return Spec({"files": {name: size}}, reads=size, writes=size, memory=MEMORY)


def _several(*, uri: str, files: Sequence[Sequence[object]]) -> Spec:
    sizes = {str(name): int(str(size)) for name, size, _ in files}
    total = sum(sizes.values())
    return Spec({"files": sizes}, reads=total, writes=total, memory=MEMORY)


@step("sources.file", version=1, spec=_one)
def file(context: Context, *, uri: str, name: str, size: int, pin: str) -> None:
    """One file of a source, as `name`. Raises MissingSource if it is gone or has changed since it was pinned."""
    wanted, place = SourceFile(name, size, pin), place_of(uri)
    grow = _counter(context, size)
    to = _inside(context.out, name)

    def bring(start: int, stop: int, part: Path) -> None:
        place.bring(uri, wanted, part, grow, start, stop)

    if place.BY_PARTS and size > PART:
        in_parts(context, size, PART, to, bring, grow)
    else:
        bring(0, size, to)


def _note_spec(*, uri: str, file: SourceFile) -> Spec:
    return Spec({"files": {file.name: file.size}, "elsewhere": True}, writes=len(Note(uri, file).dump()), memory=MEMORY)


@step("sources.reference", version=1, spec=_note_spec)
def reference(context: Context, *, uri: str, file: SourceFile) -> None:
    """A note of where one file of a source lies, with its pin and digests: see `referred.opened`.

    Where the file's SHA-256 is known, what is computed from the note counts as computed from the file.
    """
    (context.out / NOTE).write_bytes(Note(uri, file).dump())
    if file.sha256:
        context.stands_for = {file.name: file.sha256}


@step("sources.files", version=1, spec=_several)
def files(context: Context, *, uri: str, files: list[tuple[str, int, str]]) -> None:
    """Several small files of a source. Raises MissingSource if one is gone or has changed since it was pinned."""
    place = place_of(uri)
    grow = _counter(context, sum(size for _, size, _ in files))
    for name, size, pin in files:
        place.bring(uri, SourceFile(name, size, pin), _inside(context.out, name), grow, 0, size)


def files_read(target: Step) -> set[str]:
    """By what the files are known (`SourceFile.known_by`) that a step itself reads."""
    brought = [s for s in map(step_of, target.inputs) if s.name in ("sources.file", "sources.files")]
    each = [(s, f) for s in brought for f in s.params.get("files", [[s.params.get(w) for w in ("name", "size", "pin")]])]
    return {word for s, f in each for word in SourceFile(*f).known_by(str(s.params["uri"]))}


def folders_read(running: Collection[Step]) -> list[str]:
    """The folders that these steps read: those that bring files from one, and those that read a file by a note of it."""
    inputs = [step_of(i) for s in running for i in s.inputs]
    notes = (i for s in (*inputs, *(step_of(i) for s in inputs for i in s.inputs)) if (i := s).name == "sources.reference")
    uris = {str(s.params["uri"]) for s in (*running, *notes) if s.name.startswith("sources.")}
    return sorted(uri for uri in uris if uri.startswith("/"))


def in_parts(
    context: Context,
    size: int,
    part: int,
    to: Path,
    bring: Callable[[int, int, Path], None],
    grow: Callable[[int], None],
) -> None:
    """Fill `to` in parts of `part` bytes; each part that has arrived is kept for a later run."""
    parts = context.scratch / "parts"
    parts.mkdir()
    if (kept := context.resume()) is not None:
        for path in sorted(kept.iterdir()):
            move(path, parts / path.name)
    starts = range(0, size, part)
    for i, start in enumerate(starts):
        stop, at = min(start + part, size), parts / f"{i:05d}"
        if at.exists() and at.stat().st_size == stop - start:
            grow(stop - start)
            continue
        bring(start, stop, at)
        if i + 1 < len(starts):
            context.save(parts)
    with to.open("wb") as out:
        for path in sorted(parts.iterdir()):
            with path.open("rb") as piece:
                copyfileobj(piece, out, 4 << 20)
            path.unlink()  # so that the whole never lies here twice
    if (arrived := to.stat().st_size) != size:
        raise MissingSource(f"{to.name} came to {arrived} bytes instead of {size}; run again")


def _counter(context: Context, total: int) -> Callable[[int], None]:
    done = 0

    def grow(n: int) -> None:
        nonlocal done
        context.reads += n
        done += n
        context.progress(min(done, total), total, "bytes")

    return grow


def _inside(folder: Path, name: str) -> Path:
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"file name {name!r} leaves the folder; rename it at its source")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
