"""One copy of a blob per machine, however many workers; the longest unused given up first."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest

from moeflow.store import CorruptBlob, Store, StoreError
from moeflow.store import names as store_names
from tests import servers
from tests.making import ask, commit, hold_and_die, key, read


def cached(store: Store) -> set[str]:
    return {p.name for p in (store.cache / "blobs").glob("*/*")}


def sha(store: Store, word: str) -> str:
    return store.manifest(key(word)).files["x"].sha256


def test_several_workers_of_a_machine_download_a_blob_once(s3_store: Store, server: servers.Proxy, tmp_path: Path) -> None:
    commit(s3_store, tmp_path, "k", x="1" * 100_000)
    server.requests.clear()
    server.latency = 0.3  # long enough for all three to ask while the first one waits
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert set(pool.starmap(ask, [(s3_store, key("k"))] * 3)) == {"1" * 100_000}
    assert server.count("GET", "blobs/") == 1


def test_a_blob_is_downloaded_once_and_read_from_the_disk_afterwards(
    s3_store: Store, server: servers.Proxy, tmp_path: Path
) -> None:
    commit(s3_store, tmp_path, "k", x="0123456789")
    s3_store.artifact(key("k")).file("x")
    server.requests.clear()
    again = s3_store.artifact(key("k"))
    assert again.read("x", 2, 4) == b"23" and again.file("x").read_text() == "0123456789"
    assert read(again.folder()) == {"x": "0123456789"}
    assert not server.count(path="blobs/")


def test_what_arrives_wrong_is_refused_and_not_kept(s3_store: Store, tmp_path: Path) -> None:
    commit(s3_store, tmp_path, "k", x="right")
    blob = store_names.blob(sha(s3_store, "k"))
    s3_store.blobs.delete([blob])
    s3_store.blobs.create(blob, b"wrong")
    with pytest.raises(CorruptBlob, match="holds bytes with digest"):
        s3_store.artifact(key("k")).file("x")
    assert cached(s3_store) == set()


def test_the_longest_unused_blobs_are_given_up_at_the_limit(s3_store: Store, tmp_path: Path) -> None:
    store = Store(s3_store.blobs, s3_store.cache, cache_limit=250)
    for i, word in enumerate("abc"):
        commit(store, tmp_path, word, x=word * 100)
        if word != "c":
            store.artifact(key(word)).file("x")
            os.utime(store.cache / store_names.blob(sha(store, word)), (1000 + i, 1000 + i))
    store.artifact(key("a")).file("x")  # used again: now b is the longest unused
    store.artifact(key("c")).file("x")
    assert cached(store) == {sha(store, "a"), sha(store, "c")}


def test_what_a_step_holds_is_not_given_up(s3_store: Store, tmp_path: Path) -> None:
    store = Store(s3_store.blobs, s3_store.cache, cache_limit=150)
    for word in "abc":
        commit(store, tmp_path, word, x=word * 100)
    artifact = store.artifact(key("a"))
    path = artifact.file("x")
    store.artifact(key("b")).file("x")
    assert path.read_text() == "a" * 100 and artifact.read("x", 0, 3) == b"aaa"
    del artifact
    store.artifact(key("c")).file("x")
    assert cached(store) == {sha(store, "c")}


def test_what_a_worker_held_when_it_died_is_given_up(s3_store: Store, tmp_path: Path) -> None:
    store = Store(s3_store.blobs, s3_store.cache, cache_limit=150)
    for word in "ab":
        commit(store, tmp_path, word, x=word * 100)
    worker = multiprocessing.get_context("spawn").Process(target=hold_and_die, args=(store, key("a")))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL and cached(store) == {sha(store, "a")}
    store.artifact(key("b")).file("x")
    assert cached(store) == {sha(store, "b")}


def test_a_file_larger_than_the_limit_is_still_read(s3_store: Store, tmp_path: Path) -> None:
    store = Store(s3_store.blobs, s3_store.cache, cache_limit=10)
    commit(store, tmp_path, "k", x="1" * 100)
    assert store.artifact(key("k")).file("x").read_text() == "1" * 100


def test_the_cache_may_be_deleted_at_any_time(s3_store: Store, tmp_path: Path) -> None:
    commit(s3_store, tmp_path, "k", x="1")
    assert ask(s3_store, key("k")) == "1"
    shutil.rmtree(s3_store.cache)
    assert ask(s3_store, key("k")) == "1"


def test_files_that_steps_see_are_read_only_and_go_with_the_artifact(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "k", x="1", y="2")
    artifact = store.artifact(key("k"))
    paths = [artifact.file("x"), *artifact.folder().iterdir()]
    assert all(p.stat().st_mode & 0o222 == 0 for p in paths)
    opened = artifact.folder()
    del artifact
    assert not opened.exists()


def test_a_folder_can_be_laid_where_the_runner_wants_it(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "k", x="1")
    artifact = store.artifact(key("k"), scratch=tmp_path / "inputs" / "0")
    assert artifact.folder() == tmp_path / "inputs" / "0" and read(artifact.folder()) == {"x": "1"}
    assert read(artifact.folder()) == {"x": "1"}


def test_a_disk_store_lends_its_own_files(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    commit(store, tmp_path, "k", x="1" * 1000)
    assert store.artifact(key("k")).file("x") == tmp_path / "store" / store_names.blob(sha(store, "k"))


def test_a_full_cache_disk_is_one_line_that_says_where(s3_store: Store, tiny_disk: Path, tmp_path: Path) -> None:
    store = Store(s3_store.blobs, tiny_disk / "cache")
    commit(store, tmp_path, "k", x=b"1" * (2 << 20))
    with pytest.raises(StoreError, match=r"no space left on .*cache.*; free 2.0 MiB or point MOEFLOW_CACHE to another"):
        store.artifact(key("k")).file("x")
    assert cached(store) == set()
