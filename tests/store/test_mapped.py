"""Long ranges of a file on this machine's disk are views of its pages, verified as any bytes are."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from moeflow.store import CorruptBlob, Store, mapped
from moeflow.store.checked import CHUNK
from tests.making import commit, key

DATA = os.urandom(5 * CHUNK + 4321)
NO_VIEWS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a file system over a network": lambda patch: patch.setattr(mapped, "_local", frozenset),
    "a kernel that lacks the advice": lambda patch: patch.setattr(mapped, "POPULATE_READ", 12345),
    "pages that are not in memory": lambda patch: patch.setattr(os, "preadv", absent),
}


def absent(*_: object) -> int:
    raise BlockingIOError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    return path


def view(path: Path, start: int, stop: int) -> memoryview | None:
    with path.open("rb") as opened:
        return mapped.pages(opened.fileno(), os.fstat(opened.fileno()).st_dev, start, stop)


def test_a_long_range_is_a_view_that_stays_when_the_file_is_gone(file: Path) -> None:
    made = view(file, 4097, 4 * CHUNK)
    if made is None:
        pytest.skip("the temporary folder is on a file system whose pages are not shown")
    file.unlink()
    assert made.readonly and made == DATA[4097 : 4 * CHUNK]


def test_a_short_range_or_one_behind_the_end_is_none(file: Path) -> None:
    assert view(file, 0, mapped.LEAST - 1) is None
    assert view(file, 0, len(DATA) + 9000) is None


@pytest.mark.parametrize("why", ["", *NO_VIEWS])
def test_ranges_are_the_same_bytes_with_views_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    store, draw = Store.open(str(tmp_path / "store"), tmp_path / "cache"), random.Random(0)
    commit(store, tmp_path, "k", x=DATA)
    artifact = store.artifact(key("k"))
    if why:
        NO_VIEWS[why](monkeypatch)
    for _ in range(40):
        start, stop = sorted(draw.choices(range(len(DATA) + 1), k=2))
        assert artifact.read("x", start, stop) == DATA[start:stop]


@pytest.mark.parametrize("why", ["", *NO_VIEWS])
def test_a_view_of_a_rotten_chunk_is_given_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    store = Store.open(str(tmp_path / "store"), tmp_path / "cache")
    commit(store, tmp_path, "k", x=DATA)
    artifact = store.artifact(key("k"))
    path = artifact.file("x")
    path.chmod(0o644)
    with path.open("r+b") as opened:
        opened.seek(3 * CHUNK + 7)
        opened.write(bytes([DATA[3 * CHUNK + 7] ^ 1]))
    if why:
        NO_VIEWS[why](monkeypatch)
    assert artifact.read("x", 0, 3 * CHUNK) == DATA[: 3 * CHUNK]
    with pytest.raises(CorruptBlob, match="holds other bytes"):
        artifact.read("x", CHUNK + 1, 3 * CHUNK + 1)
