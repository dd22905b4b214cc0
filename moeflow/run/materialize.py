"""Run one step whose inputs are stored, in this process, and store its output. Knows no graph and no cluster."""

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
from moeflow.machine import gpu_model
from moeflow.run.call import Call
from moeflow.run.work import part_of_gpu, threads, work_folder
from moeflow.sources import elsewhere
from moeflow.step import Artifact, Resources
from moeflow.store import File, Manifest, NotStored, Store, StoreError, checked, part_digest, partial
from moeflow.store.claims import claimed
from moeflow.store.errors import too_large
from moeflow.store.patience import heard, wait_out

LIBRARIES = ("torch", "transformers", "safetensors", "pyarrow", "numpy", "ray")
LARGE = ("torch", "transformers", "tokenizers")  # of those the ones that take seconds to load
THREADS = 8
FULL = ("No space left on device", "os error 28")  # in the errors of libraries that do not raise OSError
LIMITED = "os error 27"
ELSEWHERE = "point MOEFLOW_CACHE / --store to another disk"
OFTEN = 0.2  # seconds between two progress reports of a step


class Reporter(Protocol):
    """Receives a running step's progress, scalars and notes."""

    def progress(self, key: str, done: int, total: int, unit: str, detail: str) -> None: ...

    def scalars(self, key: str, at: int, values: Mapping[str, float]) -> None: ...

    def note(self, key: str, text: str) -> None: ...

    def waits(self, where: str, remark: str) -> None:
        """Something does not answer, and is waited for."""


@dataclass(frozen=True)
class Done:
    """A stored step: the digests of its contents and of the requested parts, and what its run took."""

    key: str
    digest: str
    parts: dict[str, str] = field(default_factory=dict)
    bytes: int = 0  # of all its files
    ran: bool = True  # False if it was stored already
    reads: int = 0
    writes: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    intact: frozenset[str] = frozenset()  # digests of the blobs that this process wrote, or read and found right


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
        self.settings: Mapping[str, Any] = call.resources.settings
        self.reads = 0  # bytes from elsewhere than the inputs
        self.stands_for: Mapping[str, str] = {}
        self.kept = False  # whether there may be partial state
        self.loaded = False  # whether the process loaded large libraries meanwhile, which it does once
        self.resumed = False  # whether it goes on from a state that another attempt has saved
        self._call, self._store, self._report = call, store, report
        self._reported = 0.0
        inputs = call.record.inputs
        scratch = [work / "inputs" / str(n) for n in range(len(inputs))]
        with ThreadPoolExecutor(THREADS) as pool:
            self.inputs = [*pool.map(lambda i, to: elsewhere.seen(store, i.key, to), inputs, scratch)]

    def progress(self, done: int, total: int, unit: str, detail: str = "") -> None:
        now = time.monotonic()
        if done >= total > 0 or now - self._reported >= OFTEN:
            self._reported = now
            self._report.progress(self._call.key, done, total, unit, detail)

    def scalars(self, at: int, values: Mapping[str, float]) -> None:
        self._report.scalars(self._call.key, at, values)

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._report.note(self._call.key, text)

    def link(self, artifact: Artifact, name: str, to: str | None = None) -> None:
        to = to or name
        at, source = next(((n, i) for n, i in enumerate(self.inputs) if i is artifact), (0, None))
        if source is None:
            raise ValueError(f"{artifact.key} is no input of {self._call.record.step}; only files of inputs can be linked")
        if name not in source.names():
            known = ", ".join(source.names()) or "no file"
            raise FileNotFoundError(f"{artifact.key} has no file {name!r} to link; it has: {known}")
        if to in self.links or (self.out / (to + elsewhere.ENDING)).exists():
            raise FileExistsError(f"the output already links a file as {to!r}; pass another name as `to`")
        if isinstance(source, elsewhere.Seen) and (lies := source.elsewhere.get(name)):
            self.stands_for = {**self.stands_for, to: lies.sha256}
            elsewhere.written(replace(lies, head=b"", pieces=((at, name, 0, lies.size),)), self.out, to)
        else:
            self.links[to] = source.files[name]

    def save(self, folder: Path, at: int = 0) -> None:
        self.kept = True
        partial.save(self._store, self._call.key, folder)

    def resume(self) -> Path | None:
        self.kept = True
        if not self._resumed.exists():
            self._resumed.mkdir()
            if not partial.load(self._store, self._call.key, self._resumed):
                shutil.rmtree(self._resumed)  # it may contain part of an incomplete snapshot
                return None
        self.resumed = True
        return self._resumed


def materialize(call: Call, store: Store, report: Reporter, run: str = "") -> Done:
    """Run `call` unless it is stored by now; return what is stored. Raises what the step raises, and StoreError.

    A step whose source does not answer runs again until it does, for as long as the store's patience allows. With the mark `run`
    the step is claimed for that run; raises Busy if another run computes it.
    """
    with heard(report.waits):
        return wait_out(lambda: _attempt(call, store, report, run), store.patience, call.record.step)


def _attempt(call: Call, store: Store, report: Reporter, run: str) -> Done:
    with claimed(store, call.key, run):
        if (done := stored(call, store)) is not None:
            return done
        function = call.function  # first, because a limit on threads reaches only libraries that are loaded
        with work_folder(store.cache / "work") as work:
            context = Running(call, store, report, work)
            done = commit(call, store, context, carry_out(function, call, store, context))
            if context.kept:
                partial.drop(store, call.key)
        return done


def stored(call: Call, store: Store) -> Done | None:
    """What is stored under the call's key by now, if anything."""
    try:
        manifest = store.manifest(call.key)
    except NotStored:
        return None
    return Done(call.key, manifest.digest, _parts(call, manifest), manifest.bytes, ran=False)


def carry_out(function: Callable[..., None], call: Call, store: Store, context: Running) -> float:
    """Run the step's function; return the seconds it took. Raises what it raises, and StoreError."""
    began, before = time.monotonic(), {*LARGE} & {*sys.modules}
    with threads(call.threads), part_of_gpu(call.resources.gpus), _room(store.cache):
        args, params = call.arguments(context.inputs)
        function(context, *args, **params)
    context.loaded = {*LARGE} & {*sys.modules} != before
    return time.monotonic() - began


def commit(call: Call, store: Store, context: Running, seconds: float) -> Done:
    """Store the function's output. Raises StoreError."""
    reads, notes = context.reads + sum(i.reads for i in context.inputs), tuple(context.notes)
    writes = sum(p.stat().st_size for p in context.out.rglob("*") if p.is_file())
    record = replace(
        call.record, libraries=libraries(), notes=notes, seconds=seconds, reads=reads, stands_for=_stands_for(context),
        machine=_machine(call.resources) | {"threads": call.threads, "loaded": context.loaded, "resumed": context.resumed},
    )  # fmt: skip
    made = store.commit(call.key, context.out, record=record, links=context.links)
    parts = _parts(call, store.manifest(call.key)) if call.parts else {}
    return Done(call.key, made.digest, parts, made.bytes, True, reads, writes, seconds, notes, made.intact)


def _machine(resources: Resources) -> dict[str, Any]:
    """What tells the next forecasts where the step was computed, and by how many processes that sent each other how much."""
    gang = {"processes": resources.processes, "exchanged": resources.exchanged} if resources.processes else {}
    return {"gpu": gpu_model() if resources.gpus else ""} | gang


def _stands_for(context: Running) -> dict[str, str]:
    """The files that the output is, by name with their SHA-256, if any of them lies elsewhere."""
    if not context.stands_for:
        return {}
    here = {p.relative_to(context.out).as_posix(): p for p in context.out.rglob("*") if p.is_file()}
    own = {name: checked.file_of(path).sha256 for name, path in here.items() if not elsewhere.is_note(name)}
    return {**{name: file.sha256 for name, file in context.links.items()}, **own, **context.stands_for}


def alias(call: Call, of: str, store: Store) -> None:
    """Store the contents of `of` under the call's key; the record keeps the source and libraries that made them."""
    made = store.manifest(of)
    store.alias(call.key, of, replace(call.record, notes=made.notes, source=made.source, libraries=made.libraries))


@contextmanager
def _room(where: Path) -> Iterator[None]:
    """Turn errors of a full or limited disk under `where` into StoreError, whichever library raised them."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(words in str(error) for words in FULL):
            raise StoreError(f"no space left on {where}; free some, or {ELSEWHERE}") from error
        if (isinstance(error, OSError) and error.errno == errno.EFBIG) or LIMITED in str(error):
            raise too_large(where, ELSEWHERE) from error
        raise


def _parts(call: Call, manifest: Manifest) -> dict[str, str]:
    """The digests of the parts that other steps read."""
    return {prefix: part_digest(manifest, prefix) for prefix in call.parts}


@cache
def libraries() -> Mapping[str, str]:
    """The versions of Python, moeflow, and of LIBRARIES if they are installed."""
    versions = {"python": ".".join(map(str, sys.version_info[:3])), "moeflow": moeflow.__version__}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
