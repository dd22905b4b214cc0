"""Folders, records and keys for the tests of the store."""

import os
import signal
from pathlib import Path

from moeflow.store import Committed, File, Input, Record, Store


def key(word: str, step: str = "make.it") -> str:
    """A key as a step has it, from any word."""
    return f"{step}-{word.encode().hex():0>32}"[: len(step) + 33]


def folder(path: Path, **files: str | bytes) -> Path:
    """A folder with these files; "__" in a name stands for "/"."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        at = path / name.replace("__", "/")
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def record(step: str = "make.it", inputs: tuple[str, ...] = (), content: str = "", source: str = "") -> Record:
    above = tuple(Input(i, "0" * 32) for i in inputs)
    return Record(step=step, version=1, inputs=above, content=content, source=source)


def commit(
    store: Store,
    at: Path,
    word: str,
    *,
    inputs: tuple[str, ...] = (),
    links: dict[str, File] | None = None,
    content: str = "",
    source: str = "",
    step: str = "make.it",
    **files: str | bytes,
) -> Committed:
    """Commit a folder with these files under `key(word)`."""
    made = folder(at / "made" / word, **files)
    about = record(step, inputs, content, source)
    return store.commit(key(word, step), made, record=about, links=links)


def read(path: Path) -> dict[str, str]:
    return {p.relative_to(path).as_posix(): p.read_text() for p in sorted(path.rglob("*")) if p.is_file()}


def ask(store: Store, at: str) -> str:
    return store.artifact(at).file("x").read_text()


def hold_and_die(store: Store, at: str) -> None:
    held = store.artifact(at)
    held.file("x")
    os.kill(os.getpid(), signal.SIGKILL)
