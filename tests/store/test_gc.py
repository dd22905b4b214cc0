"""Garbage collection lists before it deletes, and never deletes what a version reaches."""

import os
import time
from pathlib import Path

import pytest

from moeflow.store import Store, partial, versions
from moeflow.store import names as store_names
from moeflow.store.gc import Policy, delete, gc
from moeflow.store.runs import Mark
from tests.making import commit, folder, key

WEEK = 7 * 86400.0


def age(store: Store) -> None:
    """Make all there is a month old."""
    root = Path(store.url)
    for path in root.rglob("*"):
        os.utime(path, (time.time() - 30 * 86400,) * 2)


@pytest.fixture
def disk(tmp_path: Path) -> Store:
    """A version `tiny@1` with a report, what it was made of, and an experiment that led nowhere."""
    store = Store.open(str(tmp_path / "store"))
    commit(store, tmp_path, "model", x="model", shared="shared")
    commit(store, tmp_path, "choice", inputs=(key("model") + "/x",), x="choice")
    commit(store, tmp_path, "out", inputs=(key("choice"),), x="out")
    commit(store, tmp_path, "report", inputs=(key("out"), key("model")), x="report")
    commit(store, tmp_path, "experiment", inputs=(key("model"),), x="experiment", shared="shared")
    versions.publish(store, "tiny", key("out"), reports=[key("report")])
    return store


def stored(store: Store) -> set[str]:
    return {*store.index(["make.it"]).keys}


def test_what_a_version_reaches_is_never_garbage(disk: Store) -> None:
    age(disk)
    garbage = gc(disk, Policy(WEEK))
    assert garbage.manifests == (key("experiment"),)
    assert [e.size for e in garbage.blobs] == [len("experiment")] and garbage.bytes == len("experiment")
    assert stored(disk) == {key(w) for w in ("model", "choice", "out", "report", "experiment")}
    deleted = delete(disk, garbage)
    assert (deleted.manifests, deleted.bytes) == (garbage.manifests, garbage.bytes)
    assert stored(disk) == {key(w) for w in ("model", "choice", "out", "report")}
    for word in ("model", "choice", "out", "report"):
        assert disk.artifact(key(word)).file("x").read_text() == word
    assert disk.artifact(key("model")).file("shared").read_text() == "shared"
    assert [*disk.blobs.list(f"found/{key('experiment')}/")] == []
    again = gc(disk, Policy(WEEK))
    assert (again.manifests, again.blobs, again.partials, again.leftovers, again.bytes) == ((), (), (), (), 0)


def test_what_is_younger_than_the_grace_period_is_spared_with_all_it_relies_on(disk: Store, tmp_path: Path) -> None:
    age(disk)
    commit(disk, tmp_path, "young", inputs=(key("experiment"),), x="young")
    assert gc(disk, Policy(WEEK)).manifests == ()
    assert gc(disk, Policy(WEEK)).blobs == ()
    assert {*gc(disk, Policy(0)).manifests} >= {key("young"), key("experiment")}


def test_a_blob_without_a_manifest_is_garbage_once_it_is_old(disk: Store, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("lost")
    disk.blobs.upload(tmp_path / "x", store_names.blob("ab" * 32))
    assert gc(disk, Policy(WEEK)).blobs == ()
    age(disk)
    versions.publish(disk, "experiment", key("experiment"))
    assert [e.name for e in gc(disk, Policy(WEEK)).blobs] == [store_names.blob("ab" * 32)]


def test_what_has_become_needed_since_the_listing_is_not_deleted(disk: Store, tmp_path: Path) -> None:
    age(disk)
    listed = gc(disk, Policy(WEEK))
    assert listed.manifests == (key("experiment"),)
    versions.publish(disk, "late", key("experiment"))
    deleted = delete(disk, listed)
    assert (deleted.manifests, deleted.blobs, deleted.bytes) == ((), (), 0)
    assert disk.artifact(key("experiment")).file("x").read_text() == "experiment"


def test_a_commit_that_relies_on_an_old_blob_saves_it(disk: Store, tmp_path: Path) -> None:
    age(disk)
    listed = gc(disk, Policy(WEEK))
    commit(disk, tmp_path, "again", y="experiment")
    delete(disk, listed)
    assert disk.artifact(key("again")).file("y").read_text() == "experiment"


def test_partial_state_that_nobody_takes_up_and_halves_are_garbage(disk: Store, tmp_path: Path) -> None:
    partial.save(disk, key("gone"), folder(tmp_path / "state", x="state"))
    folder(tmp_path / "store" / "halves", abc="cut short")
    assert gc(disk, Policy(WEEK)).partials == () and gc(disk, Policy(WEEK)).leftovers == ()
    age(disk)
    partial.save(disk, key("going"), tmp_path / "state")
    garbage = gc(disk, Policy(WEEK))
    assert garbage.partials == (key("gone"),) and [e.name for e in garbage.leftovers] == ["halves/abc"]
    delete(disk, garbage)
    assert not partial.load(disk, key("gone"), tmp_path / "a") and partial.load(disk, key("going"), tmp_path / "b")


def test_what_stays_but_cannot_be_read_is_named(disk: Store) -> None:
    blob = store_names.blob(disk.manifest(key("choice")).files["x"].sha256)
    disk.blobs.delete([blob])
    assert gc(disk, Policy(WEEK)).broken == (key("choice"),)


def test_in_s3_it_is_the_same(s3_store: Store, tmp_path: Path) -> None:
    commit(s3_store, tmp_path, "kept", x="kept")
    commit(s3_store, tmp_path, "dropped", x="dropped")
    versions.publish(s3_store, "tiny", key("kept"))
    assert gc(s3_store).manifests == ()
    time.sleep(1.1)  # S3 tells time in seconds
    garbage = gc(s3_store, Policy(0))
    assert garbage.manifests == (key("dropped"),) and garbage.bytes == len("dropped")
    delete(s3_store, garbage)
    assert stored(s3_store) == {key("kept")}
    assert s3_store.artifact(key("kept")).file("x").read_text() == "kept"


def test_a_negative_grace_period_is_refused(disk: Store) -> None:
    with pytest.raises(ValueError, match="grace is -1 seconds; give 0 or more"):
        gc(disk, Policy(-1))


def test_what_a_run_is_writing_now_is_no_garbage_whatever_the_grace(disk: Store, tmp_path: Path) -> None:
    folder(tmp_path / "store" / "halves", abc="half of a file")
    mark = Mark(disk, [])
    delete(disk, gc(disk, Policy(0)))
    assert [e.name for e in disk.blobs.list("halves/")] == ["halves/abc"]
    mark.end()
    delete(disk, gc(disk, Policy(0)))
    assert [*disk.blobs.list("halves/")] == []
