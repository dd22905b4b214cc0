"""What a source consists of, wherever it lies, and which of its files make a model or a text. Makes no requests."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from moeflow.model_files import ADAPTER_CONFIG, is_hidden, left_of, named_like, of_model
from moeflow.sources.data_files import data_files
from moeflow.store import checked
from moeflow.store.errors import CorruptBlob, MissingSource
from moeflow.store.manifest import File

Kind = Literal["model", "data"]
How = Literal["copy", "refer"]
"""Whether a model's weights are copied into the store, or read by range where they lie."""
Mtp = Literal["drop", "keep", "prune"]
"""What becomes of a model's multi-token-prediction layers: they go, stay as they are, or lose experts as the decoder layers do."""
Grow = Callable[[int], None]  # called with the number of bytes that have arrived since the last call

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class SourceFile:
    name: str  # relative to the source
    size: int  # bytes
    pin: str  # "sha256:..." on a disk, "etag:...[/version]" in S3, the commit on the hub
    sha256: str = ""  # where `Place.known` has filled it in
    chunks: str = ""  # the digests of its chunks, as in `moeflow.store.File`

    def known_by(self, uri: str) -> set[str]:
        """Its place in the source at `uri`, and what it holds where the pin tells that: a copy is known by the same."""
        if not self.size:
            return set()
        return {f"{uri}/{self.name}", self.pin} if ":" in self.pin else {f"{uri}/{self.name}"}  # a hub's pin is its commit


@dataclass(frozen=True)
class Pinned:
    uri: str  # one spelling: absolute folder, s3://bucket/prefix?.., hf://models/org/name@commit, python:stdlib
    revision: str  # the commit on the hub, else ""
    files: tuple[SourceFile, ...]
    left: tuple[str, ...] = field(default=(), compare=False)  # what lies beside a model's files and is none of them


class Place(Protocol):
    """A kind of place that sources come from: each of the modules `folder`, `s3` and `hub` is one."""

    BY_PARTS: bool  # can `bring` copy a part of a file?

    def pin(self, uri: str, kind: Kind) -> Pinned:
        """The files that are there now. Raises MissingSource."""

    def stays(self, uri: str, file: SourceFile) -> bool:
        """Whether a pinned file lies where it stays, so that it need not be copied."""

    def local(self, uri: str, file: SourceFile) -> Path | None:
        """Where a pinned file lies on a disk that users write to; None elsewhere. Raises MissingSource if it is gone."""

    def known(self, uri: str, file: SourceFile) -> SourceFile:
        """A pinned file with its digests, if it lies on a disk; elsewhere as it is. Raises MissingSource if it has changed."""

    def read(self, uri: str, file: SourceFile, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a pinned file, compared with its digests if they are known.

        Raises MissingSource if it has changed.
        """

    def bring(self, uri: str, file: SourceFile, to: Path, grow: Grow, start: int, stop: int) -> None:
        """Copy the bytes [start, stop) of a pinned file to `to`. Raises MissingSource if it has changed."""


def chosen(names: Iterable[str], kind: Kind, where: str) -> tuple[list[str], tuple[str, ...]]:
    """The files of a model, as `model_files` lists them, or of a text, sorted; and what a model's folder holds beside them.

    Raises MissingSource if there are none. If a model is only there as a pickle, the message says how to convert it.
    """
    names = sorted(n for n in names if not is_hidden(n))
    if kind == "data":
        return data_files(names, where), ()
    files = of_model(names)
    if ADAPTER_CONFIG in files or any(n.endswith(".safetensors") for n in files):
        return files, left_of(names, files)
    if pickles := [n for n in names if n.endswith(PICKLES) and "/" not in n]:
        raise MissingSource(
            f"{where} holds its weights only as a pickle ({pickles[0]}), which can run code when read; convert it once "
            "where that is safe: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW), and give NEW"
        )
    if own := [n for n in names if named_like(n, ("*.safetensors", "*/*.safetensors"))]:
        raise MissingSource(
            f"{where} holds no weights that transformers reads: {own[0]} has its maker's own form, or lies in a folder of its own; "
            "give the folder of a checkpoint with model.safetensors, or its index"
        )
    raise MissingSource(f"{where} holds no *.safetensors; give the folder of a checkpoint")


def changed(what: str, pin: str, now: str) -> MissingSource:
    return MissingSource(f"{what} has changed since it was pinned (was {pin}, is {now}); run again to pin it anew")


def piece(path: Path, file: SourceFile, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file whose digests are known. Raises MissingSource if others were pinned."""
    try:
        return bytes(checked.piece(path, File(file.sha256, file.size, file.chunks), start, max(start, min(stop, file.size))))
    except CorruptBlob as error:
        why = error.why.partition(" ")[2]  # without the name that it would have in a store
        raise MissingSource(
            f"{path} has changed since it was pinned: it {why}; run again to pin it anew, or restore it if nobody changed it"
        ) from None


def copy(path: Path, to: Path, grow: Grow, update: Callable[[bytes], object]) -> None:
    """Copy a file; `update` is called with its bytes on the way, piece by piece."""
    with path.open("rb") as opened, to.open("wb") as out:
        while chunk := opened.read(4 << 20):
            update(chunk)
            out.write(chunk)
            grow(len(chunk))
