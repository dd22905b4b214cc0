"""Run one step whose inputs are stored, here and now, and store what it leaves. Knows no graph and no cluster."""

import errno
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import moeflow
from moeflow.run.call import Call
from moeflow.run.work import threads, work_folder
from moeflow.step import Artifact
from moeflow.store import File, Input, Manifest, Record, Store, StoreError, part_digest

LIBRARIES = ("torch", "transformers", "safetensors", "datasets", "numpy", "ray")
THREADS = 8
FULL = ("No space left on device", "os error 28")  # how libraries that raise errors of their own say it
OFTEN = 0.2  # seconds between two words about one step's progress


class Reporter(Protocol):
    """Where a running step's words go."""

    def progress(self, key: str, done: int, total: int, unit: str, detail: str) -> None: ...

    def note(self, key: str, text: str) -> None: ...


@dataclass(frozen=True)
class Done:
    """A step that is stored: the digest of its contents and of the parts that were asked for, and what it took."""

    key: str
    digest: str
    parts: dict[str, str] = field(default_factory=dict)
    bytes: int = 0  # of all its files
    ran: bool = True  # False where it was stored already
    reads: int = 0
    writes: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


class Running:
    """The Context of one running step."""

    rank = local_rank = 0
    processes = 1

    def __init__(self, call: Call, store: Store, report: Reporter, work: Path) -> None:
        self.out = work / "out"
        self.scratch = work / "scratch"
        self._resumed = work / "resumed"
        self.out.mkdir()
        self.scratch.mkdir()
        self.links: dict[str, File] = {}
        self.notes: list[str] = []
        self.settings: Mapping[str, Any] = {}
        self.kept = False  # whether there may be partial state
        self._call, self._store, self._report = call, store, report
        self._told = 0.0
        scratch = [work / "inputs" / str(n) for n in range(len(call.inputs))]
        with ThreadPoolExecutor(THREADS) as pool:
            held = pool.map(lambda i, to: store.artifact(i.name, scratch=to), call.inputs, scratch)
            self.inputs = [*held]

    def progress(self, done: int, total: int, unit: str, detail: str = "") -> None:
        now = time.monotonic()
        if done >= total > 0 or now - self._told >= OFTEN:
            self._told = now
            self._report.progress(self._call.key, done, total, unit, detail)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._report.note(self._call.key, text)

    def link(self, artifact: Artifact, name: str, to: str | None = None) -> None:
        to = to or name
        held = next((i for i in self.inputs if i is artifact), None)
        if held is None:
            raise ValueError(f"{artifact.key} is no input of {self._call.name}; only files of inputs can be linked")
        if name not in held.files:
            known = ", ".join(held.files) or "no file"
            raise FileNotFoundError(f"{artifact.key} has no file {name!r} to link; it has: {known}")
        if to in self.links:
            raise FileExistsError(f"the output already links a file as {to!r}; pass another name as `to`")
        self.links[to] = held.files[name]

    def save(self, folder: Path, at: int = 0) -> None:
        self.kept = True
        self._store.save_partial(self._call.key, folder)

    def resume(self) -> Path | None:
        self.kept = True
        if not self._resumed.exists():
            self._resumed.mkdir()
            if not self._store.load_partial(self._call.key, self._resumed):
                shutil.rmtree(self._resumed)  # it may hold part of a snapshot that was not whole
                return None
        return self._resumed


def materialize(call: Call, store: Store, report: Reporter) -> Done:
    """Run `call` unless it is stored by now; say what is stored. Raises what the step raises, and StoreError."""
    if (done := stored(call, store)) is not None:
        return done
    function = call.function  # first, so that the libraries it imports are loaded when their threads are limited
    with work_folder(store.cache / "work") as work:
        context = Running(call, store, report, work)
        done = commit(call, store, context, carry_out(function, call, store, context))
        if context.kept:
            store.drop_partial(call.key)
    return done


def stored(call: Call, store: Store) -> Done | None:
    """What is there under the call's key by now."""
    if not store.has(call.key):
        return None
    manifest = store.manifest(call.key)
    return Done(call.key, manifest.digest, _parts(call, manifest), manifest.bytes, ran=False)


def carry_out(function: Callable[..., None], call: Call, store: Store, context: Running) -> float:
    """Run the step's function here and now; the seconds it took. Raises what it raises, and StoreError."""
    began = time.monotonic()
    with threads(call.threads), _room(store.cache):
        args, params = call.arguments(context.inputs)
        function(context, *args, **params)
    return time.monotonic() - began


def commit(call: Call, store: Store, context: Running, seconds: float) -> Done:
    """Store what the function left. Raises StoreError."""
    reads = sum(i.reads for i in context.inputs)
    writes = sum(p.stat().st_size for p in context.out.rglob("*") if p.is_file())
    record = record_of(call, notes=tuple(context.notes), seconds=seconds, reads=reads)
    made = store.commit(call.key, context.out, record=record, links=context.links)
    parts = _parts(call, store.manifest(call.key)) if call.parts else {}
    return Done(call.key, made.digest, parts, made.bytes, True, reads, writes, seconds, record.notes)


def alias(call: Call, of: str, store: Store) -> None:
    """Store under the call's key what `of` holds; the record says who really made it, with what."""
    made = store.manifest(of)
    record = replace(record_of(call, notes=made.notes), source=made.source, libraries=made.libraries)
    store.alias(call.key, of, record)


@contextmanager
def _room(where: Path) -> Iterator[None]:
    """Turn a disk under `where` that a step fills into one line, whichever library met it."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(words in str(error) for words in FULL):
            raise StoreError(f"no space left on {where}; free some, or point MOEFLOW_CACHE / --store to another disk") from error
        raise


def _parts(call: Call, manifest: Manifest) -> dict[str, str]:
    """The digests of the parts that others read."""
    return {prefix: part_digest(manifest, prefix) for prefix in call.parts}


def record_of(call: Call, *, notes: tuple[str, ...] = (), seconds: float = 0.0, reads: int = 0) -> Record:
    return Record(
        step=call.name,
        version=call.version,
        params=call.params,
        inputs=tuple(Input(i.name, i.digest) for i in call.inputs),
        content=call.content,
        source=call.source,
        libraries=dict(libraries()),
        notes=notes,
        seconds=seconds,
        reads=reads,
    )


@cache
def libraries() -> Mapping[str, str]:
    """The versions of what computes, where installed, and of Python."""
    found = {"python": ".".join(map(str, sys.version_info[:3])), "moeflow": moeflow.__version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
