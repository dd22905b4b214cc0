"""Disks that are full, forbidden or not what they should be: one line that says what to do, and nothing lost."""

import errno
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeflow.sizes import bytes_text
from moeflow.store import LocalBlobs, Store, StoreError
from moeflow.store.errors import disk
from tests.making import commit, folder, key, record


@pytest.fixture
def forbidden() -> Iterator[Path]:
    """A folder that this process may read and not write: also where tests run as root."""
    top = Path(tempfile.mkdtemp())
    top.chmod(0o755)
    store = Store.open(str(top / "store"))
    commit(store, top, "k", x="1")
    for path in [top, *top.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield top / "store"
    if root:
        os.seteuid(0)
    for path in [top, *top.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(top)


def test_a_full_disk_says_how_much_to_free_and_nothing_is_half_written(tiny_disk: Path, tmp_path: Path) -> None:
    store = Store.open(str(tiny_disk / "store"))
    store.check()
    commit(store, tmp_path, "small", x="1")
    with pytest.raises(StoreError, match=r"no space left on .*store; free 2.0 MiB or pass another --store"):
        commit(store, tmp_path, "large", x=b"1" * (2 << 20), y="2")
    assert not store.has(key("large")) and {*store.index(["make.it"]).keys} == {key("small")}
    assert [*store.blobs.list("halves/")] == []
    assert store.artifact(key("small")).file("x").read_text() == "1"
    (tmp_path / "made" / "large" / "x").write_bytes(b"1" * (512 << 10))
    assert store.commit(key("large"), tmp_path / "made" / "large", record=record()).first


def test_pulling_onto_a_full_disk_leaves_nothing(tmp_path: Path, tiny_disk: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    commit(store, tmp_path, "k", x=b"1" * (2 << 20))
    with pytest.raises(StoreError, match=r"no space left on .*tiny; free 2.0 MiB or name a folder elsewhere"):
        store.fetch(key("k"), tiny_disk / "out")
    assert [*tiny_disk.iterdir()] == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_from_other_trouble(number: int) -> None:
    says = r"no space left on /x; free 1\.5 KiB or pass another --store"
    with pytest.raises(StoreError, match=says), disk(Path("/x"), 1536):
        raise OSError(number, os.strerror(number))
    with pytest.raises(OSError, match="Input/output"), disk(Path("/x")):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_file_that_may_not_become_so_large_is_told_and_nothing_is_half_written(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    source = folder(tmp_path / "made", x=b"1" * 2000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "second-link").hardlink_to(source / "x")  # so that it is copied
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StoreError, match=r"a file under .*store became larger than is allowed; .*ulimit -f.*, or pass another"):
            store.commit(key("large"), source, record=record())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not store.has(key("large")) and [*store.blobs.list("halves/")] == []


def test_a_store_without_write_permission_says_so_before_the_run_and_can_be_read(forbidden: Path) -> None:
    store = Store.open(str(forbidden))
    with pytest.raises(StoreError, match=r"no permission for .*; make .* writable or pass another --store"):
        store.check()
    assert store.has(key("k")) and key("k") in store.index(["make.it"]).keys
    assert store.artifact(key("k")).file("x").read_text() == "1"
    with pytest.raises(StoreError, match="no permission"):
        store.blobs.create("x", b"")


def test_a_store_that_is_a_file_or_lies_under_one_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="is a file; give a folder or s3://"):
        LocalBlobs(tmp_path / "file").check()
    with pytest.raises(StoreError, match="lies under a file; give a folder or s3://"):
        LocalBlobs(tmp_path / "file" / "store").check()


def test_a_store_that_the_system_lets_nobody_make_is_told() -> None:
    with pytest.raises(StoreError, match=r"^store /proc/none cannot be made or written to \(.*\); give a folder or s3://"):
        Store.open("/proc/none").check()


def test_a_name_that_is_too_long_for_the_disk_is_said_to_be(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    commit(store, tmp_path, "k", x="1")
    with pytest.raises(StoreError, match="a name is too long for the disk"):
        store.commit("k" * 300, folder(tmp_path / "y", x="1"), record=record())
    with pytest.raises(StoreError, match="a name is too long for the disk"):
        Store.open(str(tmp_path / ("x" * 300))).check()


def test_sizes_are_said_for_people() -> None:
    said = [bytes_text(n) for n in (0, 1023, 1536, 5 << 20, 3 << 30, 7 << 40)]
    assert said == ["0 bytes", "1023 bytes", "1.5 KiB", "5.0 MiB", "3.0 GiB", "7.0 TiB"]
