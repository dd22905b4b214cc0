"""The newest complete checkpoint below a folder or an S3 prefix, or the revision that a hub repository is at.

A checkpoint is complete if its index and every shard that it names are there. Below one prefix a look is one listing, and a few
small files. What is half there is told with what it lacks.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlencode

from moeflow.model_files import ADAPTER_CONFIG, ADAPTERS, INDEX, named_like, of_model
from moeflow.sources import s3 as in_s3
from moeflow.sources.source import address, pin
from moeflow.store import s3
from moeflow.store.address import parse_s3
from moeflow.store.errors import MissingSource

Kind = Literal["model", "adapter", "zero"]
ZERO = re.compile(r"(global_step[^/]*/)?(zero_pp_rank_|mp_rank_|bf16_zero_pp_rank_)[^/]*\.pt")
SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
LONGEST_HEADER = 100 << 20  # bytes; what safetensors itself allows


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it lies there."""

    uri: str
    """Its address, as `-p model=` takes it."""
    kind: Kind
    mark: str
    """A digest of its files' names, sizes and tags: another one means that something has changed."""
    lacks: str = ""
    """What it lacks to be complete; "" if it is."""
    base: str = ""
    """Of an adapter: the model that it names as the one it was trained on."""
    files: tuple[str, ...] = ()
    """The names of the files that make it; none of one on the hub."""


@dataclass(frozen=True)
class _File:
    size: int
    tag: str
    modified: float


def newest(source: str, marker: str = "") -> tuple[Checkpoint | None, Checkpoint | None]:
    """The newest complete checkpoint, and one that is newer but not complete; None for each that is not there.

    `source`: a folder or `s3://bucket/prefix`, which is a checkpoint or holds some in folders below, or `org/name[@revision]` on
    the hub. `marker`: the name of a file without which a checkpoint is not complete, as its writer leaves at the end. Raises
    MissingSource, a ValueError, if the source is not there or holds nothing like a checkpoint.
    """
    uri = address(source, "model")
    if uri.startswith("hf://"):
        return _on_hub(uri), None
    if uri.startswith("s3://"):
        files, at, read = _in_bucket(uri)
    else:
        files, at, read = _in_folder(uri)
    looked = [_looked(below, inside, marker, at, read) for below, inside in _by_age(files)]
    if not looked:
        raise MissingSource(f"{source} holds no checkpoint: no folder with a config.json or {ADAPTER_CONFIG} and weights is there")
    whole = next((n for n, one in enumerate(looked) if not one.lacks), None)
    arriving = looked[0] if whole != 0 else None
    return (None if whole is None else looked[whole]), arriving


def _by_age(files: Mapping[str, _File]) -> list[tuple[str, dict[str, _File]]]:
    """The folders that hold something like a checkpoint, newest first, each with the files that make it, by their names in it."""
    folders: dict[str, dict[str, _File]] = defaultdict(dict)
    for name, file in files.items():
        path = PurePosixPath(name)
        above = "" if str(path.parent) == "." else str(path.parent)
        if ZERO.fullmatch(f"{path.parent.name}/{path.name}"):
            above = "" if str(path.parent.parent) == "." else str(path.parent.parent)
        folders[above][name.removeprefix(f"{above}/") if above else name] = file
    found = [(below, inside, parts) for below, inside in folders.items() if (parts := _parts(inside)[1])]
    found.sort(key=lambda one: (max(f.modified for f in one[2].values()), _natural(one[0])), reverse=True)
    return [(below, inside) for below, inside, _ in found]


def _parts(inside: Mapping[str, _File]) -> tuple[Kind, dict[str, _File]]:
    """What kind of checkpoint a folder holds, and the files that make it; none if it is none."""
    made = {n: inside[n] for n in of_model(inside)}
    zero = {n: f for n, f in inside.items() if ZERO.fullmatch(n)}
    if _weights(made):
        return "model", made
    if ADAPTER_CONFIG in made:
        return "adapter", made
    if zero:
        return "zero", made | zero | {n: f for n, f in inside.items() if n == "latest"}
    return "model", made if "config.json" in made else {}


def _looked(below: str, inside: Mapping[str, _File], marker: str, at: Callable[[str], str], read: "Reader") -> Checkpoint:
    """What one folder holds."""
    kind, parts = _parts(inside)
    listed = json.dumps(sorted((n, f.size, f.tag) for n, f in parts.items()))
    mark = hashlib.sha256(f"{at(below)}\n{listed}".encode()).hexdigest()

    def content(name: str) -> dict[str, Any]:
        raw = json.loads(read.text(f"{below}/{name}" if below else name))
        return raw if isinstance(raw, dict) else {}

    lacks = f"it lacks {marker}" if marker and marker not in inside else ""
    if kind == "adapter":
        base = ""
        try:
            base = str(content(ADAPTER_CONFIG).get("base_model_name_or_path") or "")
        except ValueError:
            lacks = lacks or f"its {ADAPTER_CONFIG} is cut short"
        if not any(named_like(n, ("adapter_model*",)) for n in parts):
            lacks = lacks or "it lacks adapter_model.safetensors"
        return Checkpoint(at(below), kind, mark, lacks, base, tuple(sorted(parts)))
    if kind == "model":
        lacks = lacks or _lacking(parts, content, lambda n: read.whole(f"{below}/{n}" if below else n, parts[n].size))
    return Checkpoint(at(below), kind, mark, lacks, files=tuple(sorted(parts)))


def _weights(made: Mapping[str, _File]) -> list[str]:
    return [n for n in made if n.endswith(".safetensors") and not named_like(n, ADAPTERS)]


def _lacking(made: Mapping[str, _File], content: Callable[[str], dict[str, Any]], whole: Callable[[str], bool]) -> str:
    """What a folder with a model lacks, in words; "" if nothing."""
    needed = _weights(made)
    if INDEX in made:
        try:
            needed = sorted({str(n) for n in content(INDEX)["weight_map"].values()})
        except (ValueError, KeyError, AttributeError):
            return f"its {INDEX} is cut short"
    elif any(SHARD.fullmatch(n) for n in needed):
        return f"it has shards and lacks {INDEX}"
    if not needed:
        return "it lacks its weights, model.safetensors or an index with shards"
    if missing := [n for n in needed if n not in made]:
        return f"it lacks {missing[0]}" + (f" and {len(missing) - 1} more shards" if len(missing) > 1 else "")
    if "config.json" not in made:
        return "it lacks config.json"
    short = next((n for n in needed if not whole(n)), "")
    return f"its {short} is cut short" if short else ""


@dataclass(frozen=True)
class Reader:
    """How small files below a source are read, and whether a file with weights is whole."""

    text: Callable[[str], str]
    whole: Callable[[str, int], bool]


def _in_folder(uri: str) -> tuple[dict[str, _File], Callable[[str], str], Reader]:
    root = Path(uri).expanduser().absolute()
    if not root.is_dir():
        raise MissingSource(f"{uri}: there is no such folder; give a folder, s3://bucket/prefix or org/name on the hub")

    def listed() -> Iterator[tuple[str, _File]]:
        for path in root.rglob("*"):
            inside = path.relative_to(root).as_posix()
            if path.is_file() and not any(part.startswith(".") for part in inside.split("/")):
                about = path.stat()
                yield inside, _File(about.st_size, str(about.st_mtime_ns), about.st_mtime)

    return dict(listed()), lambda below: str(root / below), Reader(lambda n: (root / n).read_text(), lambda n, _: _whole(root / n))


def _whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(LONGEST_HEADER, path.stat().st_size):
            return False
        try:
            header = json.loads(file.read(length))
            ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return False
    return bool(path.stat().st_size == 8 + length + max(ends, default=0))


def _in_bucket(uri: str) -> tuple[dict[str, _File], Callable[[str], str], Reader]:
    at = parse_s3(uri)
    client = s3.client(**at.options)
    above = f"{at.prefix}/" if at.prefix else ""
    query = urlencode({k: v for k, v in sorted(at.options.items()) if v}, safe=":/")

    def where(below: str) -> str:
        return f"s3://{at.bucket}/{above}{below}".rstrip("/") + (f"?{query}" if query else "")

    with in_s3.asked(uri):
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=at.bucket, Prefix=above)
        files = {
            o["Key"].removeprefix(above): _File(o["Size"], o["ETag"].strip('"'), o["LastModified"].timestamp())
            for page in pages
            for o in page.get("Contents", ())
            if not o["Key"].endswith("/")
        }
    if not files:
        raise MissingSource(f"{uri}: there are no such objects; check bucket and prefix")

    def text(name: str) -> str:
        with in_s3.asked(uri):
            return s3.read_body(client, {"Bucket": at.bucket, "Key": f"{above}{name}"}).decode(errors="replace")

    return files, where, Reader(text, lambda name, size: size > 0)  # an object is there when all of it has arrived


def brought(there: Checkpoint, to: Path) -> Path:
    """The folder with a checkpoint's files: where it lies, or the empty folder `to`, into which they are copied from S3."""
    if not there.uri.startswith("s3://"):
        return Path(there.uri)
    at = parse_s3(there.uri)
    client = s3.client(**at.options)
    for name in there.files:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        with in_s3.asked(there.uri):
            client.download_file(at.bucket, f"{at.prefix}/{name}", str(to / name))
    return to


def _on_hub(uri: str) -> Checkpoint:
    """The repository at its revision, which is pinned to a commit: always complete."""
    pinned = pin(uri, kind="model")
    names = pinned.names()
    weights = [n for n in names if n.endswith(".safetensors") and not named_like(n, ADAPTERS)]
    name = pinned.uri.removeprefix("hf://models/")
    if weights or ADAPTER_CONFIG not in names:
        return Checkpoint(name, "model", pinned.revision)
    base = json.loads(pinned.text(ADAPTER_CONFIG)).get("base_model_name_or_path") or ""
    return Checkpoint(name, "adapter", pinned.revision, base=str(base))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts checkpoint-90 before checkpoint-500."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
