"""A model or text that exists elsewhere, pinned as it is when the graph is built, without reading large files.

`where.py` knows the places that bytes come from, and the steps in `steps.py` bring them into the store.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from moeflow.sources import steps
from moeflow.sources.absent import is_repository
from moeflow.sources.places import How, Kind, Mtp, Pinned, SourceFile
from moeflow.sources.where import hub_uri, place_of
from moeflow.step import Step
from moeflow.store.errors import MissingSource

POINTER, POINTER_BYTES = b"version https://git-lfs", range(100, 301)  # how a Git LFS pointer begins, and the bytes of one
LayoutWanted = Literal["source", "per_expert"]
"""How what is made of a model has its experts on disk: as the model has, or one tensor for each matrix."""


@dataclass(frozen=True)
class Source(Pinned):
    """A pinned model or text: its place, and its files with their pins, by name.

    `refer`: whether its weights are read where they lie, by range, instead of being copied into the store. `adapter`: the source of
    the adapter that is to be merged into the weights, which may be this very source. `layout`: how what is made of it has its
    experts on disk. `mtp`: what becomes of its multi-token-prediction layers.
    """

    refer: bool = False
    adapter: "Source | None" = None
    layout: LayoutWanted = "source"
    mtp: Mtp = "drop"

    def names(self) -> list[str]:
        return [f.name for f in self.files]

    def find(self, name: str) -> SourceFile:
        """The file with this name. Raises MissingSource, naming the files there are."""
        for file in self.files:
            if file.name == name:
                return file
        known = ", ".join(self.names()[:20]) + (", ..." if len(self.files) > 20 else "")
        raise MissingSource(f"{self.uri} has no file {name!r}; it has: {known}")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes [start, stop) of one file, read at once: for headers and configuration. Raises MissingSource."""
        file = self.find(name)
        return place_of(self.uri).read(self.uri, file, start, file.size if stop is None else stop)

    def path(self, name: str) -> Path | None:
        """Where one file lies on a disk that users write to; None for a file on the hub, cached or not, and in S3."""
        return place_of(self.uri).local(self.uri, self.find(name))

    def text(self, name: str) -> str:
        return self.read(name).decode()

    def file(self, name: str) -> Step:
        """The step that brings one file, of any size, into the store, as `name`."""
        file = self.find(name)
        return steps.file(uri=self.uri, name=file.name, size=file.size, pin=file.pin)

    def weights(self, name: str) -> Step:
        """The step for one file of a model's weights: it is copied into the store as `name`, or referred to."""
        if not self.refer:
            return self.file(name)
        file = place_of(self.uri).known(self.uri, self.find(name))
        return steps.reference(uri=self.uri, file=file)

    def group(self, names: Iterable[str]) -> Step:
        """The step that brings several small files into the store, under their names."""
        files = [self.find(n) for n in sorted({*names})]
        return steps.files(uri=self.uri, files=[(f.name, f.size, f.pin) for f in files])


def pin(
    uri: str, *, kind: Kind, how: How | None = None, adapter: str | None = None, layout: LayoutWanted = "source",
    mtp: Mtp | None = None,
) -> Source:  # fmt: skip
    """The files at `uri` as they are now, pinned so that a later change is noticed.

    A folder, a file, a glob, `s3://bucket/prefix`, `hf://datasets/org/name[@revision][/glob]`, `python:stdlib`, and for
    a model also `org/name[@revision]` on the hub if there is no such folder. `how`: whether a model's weights are copied into the
    store or read where they lie; None: they are read where they stay, which is S3, a disk, and the user's hub cache. `adapter`:
    "merge" for an adapter that lies beside a model's weights, or the address of one. `layout`: how what is made of a model has its
    experts on disk. `mtp`: what becomes of its multi-token-prediction layers; None: they are dropped.

    Raises MissingSource, a ValueError.
    """
    # what lies on this machine first, so that a path to nothing is told before the hub is asked
    wanted = [uri, *([adapter] if adapter and adapter != "merge" else [])]
    by_address = {one: _pin(one, kind, how) for one in sorted(wanted, key=lambda one: "://" in address(one, kind))}
    made = replace(by_address[uri], layout=layout, mtp=mtp or "drop")
    return replace(made, adapter=made if adapter == "merge" else by_address[adapter]) if adapter else made


def address(uri: str, kind: Kind) -> str:
    """The same as an address that names its place: a model's name on the hub as hf://models/org/name@revision.

    Raises MissingSource for what no place can have. Asks nobody.
    """
    if not uri:
        raise MissingSource(f"the {kind} is ''; give a folder, s3://bucket/prefix or a name on the hub")
    try:
        absent = "://" not in uri and not Path(uri).expanduser().exists()
    except (OSError, RuntimeError) as error:  # a name that no disk can have, or the home of nobody
        raise MissingSource(f"{uri:.200}: {getattr(error, 'strerror', None) or error}; check the path") from None
    if (absent or uri.startswith("http")) and is_repository(uri, kind):
        if kind == "model":
            return hub_uri(uri)
        raise MissingSource(f"{uri}: there is no such file or folder; a text on the hub is hf://datasets/{uri}")
    return uri


def _pin(uri: str, kind: Kind, how: How | None) -> Source:
    """The files at one address; see `pin`."""
    uri = address(uri, kind)
    pinned = place_of(uri).pin(uri, kind)
    for name in (*(f.name for f in pinned.files), *pinned.left):
        if not name.isprintable() or {"", ".", ".."} & {*name.split("/")}:
            raise MissingSource(f"{uri} has a file named {name!r}, which no folder can take as it is; rename it there")
    refer = kind == "model" and (how == "refer" if how else _stays(pinned))
    files = tuple(sorted(pinned.files, key=lambda f: f.name))
    return _fetched(Source(pinned.uri, pinned.revision, files, pinned.left, refer), kind)


def _fetched(source: Source, kind: Kind) -> Source:
    """The same source. Raises MissingSource if one of its files is a Git LFS pointer: a clone whose data was not fetched."""
    for file in source.files:
        if file.size in POINTER_BYTES and not source.uri.startswith("hf://") and source.read(file.name).startswith(POINTER):
            name = "the data set as hf://datasets/org/name" if kind == "data" else "the model as org/name"
            raise MissingSource(
                f"{file.name} at {source.uri} is a Git LFS pointer, and the data that it points to was not fetched; run "
                f"`git lfs pull` there, or name {name}"
            )
    return source


def _stays(pinned: Pinned) -> bool:
    place = place_of(pinned.uri)
    return all(place.stays(pinned.uri, f) for f in pinned.files if f.name.endswith(".safetensors"))
