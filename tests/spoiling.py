"""Ways to spoil a copy of a good checkpoint, each a function that returns a function of the checkpoint's folder."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Spoil = Callable[[Path], None]

SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"
ESCAPE = "\x1b[31mred\x1b[0m"


def holds(name: str, content: bytes | str) -> Spoil:
    """The file holds this instead."""
    return lambda folder: _write(folder / name, content)


def without(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def cut(name: str, fraction: float = 0.5) -> Spoil:
    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * fraction)])

    return spoil


def longer(name: str, more: bytes) -> Spoil:
    return lambda folder: _write(folder / name, (folder / name).read_bytes() + more)


def entries(name: str, **changes: Any) -> Spoil:
    """The JSON file has these entries, or not, where one is `...`."""

    def spoil(folder: Path) -> None:
        value = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))

    return spoil


def config(**changes: Any) -> Spoil:
    return entries("config.json", **changes)


def index(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """The map of the index is changed."""

    def spoil(folder: Path) -> None:
        value = json.loads((folder / INDEX).read_text())
        change(value["weight_map"])
        (folder / INDEX).write_text(json.dumps(value))

    return spoil


def header(change: Callable[[dict[str, Any]], Any], name: str = SHARD) -> Spoil:
    """The header of a safetensors file is changed in place, or replaced by what `change` returns; the data stay."""

    def spoil(folder: Path) -> None:
        old, data = split(folder / name)
        made = change(old)
        join(folder / name, old if made is None else made, data)

    return spoil


def tensor(name: str = Q, **changes: Any) -> Spoil:
    """One tensor's entry in the header has other fields; one is left out where it is `...`."""

    def change(entries: dict[str, Any]) -> None:
        entries[name] = {k: v for k, v in (entries[name] | changes).items() if v is not ...}

    return header(change)


def moved(by: tuple[int, int], name: str = Q) -> Spoil:
    """The data of one tensor begin and end elsewhere, in bytes."""

    def change(entries: dict[str, Any]) -> None:
        start, stop = entries[name]["data_offsets"]
        entries[name]["data_offsets"] = [start + by[0], stop + by[1]]

    return header(change)


def renamed(old: str, new: str) -> Spoil:
    """A tensor has another name, in its file and in the index."""

    def spoil(folder: Path) -> None:
        files = json.loads((folder / INDEX).read_text())["weight_map"]
        header(lambda entries: {new if n == old else n: e for n, e in entries.items()}, files[old])(folder)
        index(lambda names: names.update({new: names.pop(old)}))(folder)

    return spoil


def reshaped(name: str, shape: list[int]) -> Spoil:
    """A tensor has another shape of as many numbers."""

    def spoil(folder: Path) -> None:
        files = json.loads((folder / INDEX).read_text())["weight_map"]
        header(lambda entries: entries[name].update(shape=shape), files[name])(folder)

    return spoil


def added(name: str, shape: tuple[int, ...] = (2,), file: str = OTHER, *, listed: bool = True) -> Spoil:
    """A file holds one more tensor of zeros."""

    def spoil(folder: Path) -> None:
        old, data = split(folder / file)
        size = 4
        for n in shape:
            size *= n
        old[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + size]}
        join(folder / file, old, data + bytes(size))
        if listed:
            index(lambda names: names.update({name: file}))(folder)

    return spoil


def absent(name: str) -> Spoil:
    """The checkpoint lacks a tensor, and says nothing of it."""

    def spoil(folder: Path) -> None:
        file = json.loads((folder / INDEX).read_text())["weight_map"][name]
        old, data = split(folder / file)
        start, stop = old.pop(name)["data_offsets"]
        for entry in (e for n, e in old.items() if n != "__metadata__" and e["data_offsets"][0] >= stop):
            entry["data_offsets"] = [at - (stop - start) for at in entry["data_offsets"]]
        join(folder / file, old, data[:start] + data[stop:])
        index(lambda names: names.pop(name))(folder)

    return spoil


def linked(name: str, to: str) -> Spoil:
    """The file is a symbolic link to a path beside the checkpoint's folder, where a good copy lies."""

    def spoil(folder: Path) -> None:
        target = folder / to
        if not target.exists() and not to.startswith("nowhere"):
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / name).replace(target)
        else:
            (folder / name).unlink()
        (folder / name).symlink_to(to)

    return spoil


def pipe(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def directory(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


def both(*several: Spoil) -> Spoil:
    def spoil(folder: Path) -> None:
        for one in several:
            one(folder)

    return spoil


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def join(path: Path, header: Any, data: bytes) -> None:
    """Write a safetensors file with a header that may be anything: bytes are taken as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _write(path: Path, content: bytes | str) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
