"""A plan of thousands of steps asks for a few pages of names."""

from pathlib import Path

import pytest
from moto.backends import get_backend

from moeflow.store import Listed, Store
from tests import servers
from tests.making import commit, key, record


def test_the_index_tells_contents_source_and_size_without_reading_a_manifest(
    s3_store: Store, server: servers.Proxy, tmp_path: Path
) -> None:
    made = commit(s3_store, tmp_path, "a", content=key("content"), source="0123456789" * 6, x="1234")
    commit(s3_store, tmp_path, "b", step="make", x="1")
    server.requests.clear()
    index = s3_store.index(["make.it"])
    assert index.keys == {key("a"): Listed(made.digest, "01234567", 4)}
    assert index.contents == {key("content"): key("a")}
    assert {r.method for r in server.requests} == {"GET"} and len(server.requests) == 2
    assert all("list-type=2" in r.path for r in server.requests)


def test_both_places_give_the_same_index(store: Store, tmp_path: Path) -> None:
    made = commit(store, tmp_path, "a", content=key("content"), x="1234")
    store.alias(key("b"), key("a"), record(content=key("content")))
    index = store.index(["make.it", "other", "make"])
    assert index.keys == {key("a"): Listed(made.digest, "0", 4), key("b"): Listed(made.digest, "0", 4)}
    assert index.contents[key("content")] in (key("a"), key("b"))
    assert store.index(["other", "make", "make.it-0"]).keys == {}


def test_an_artifact_whose_marker_was_never_written_is_found_all_the_same(store: Store, tmp_path: Path) -> None:
    made = commit(store, tmp_path, "a", content=key("content"), source="ab" * 32, x="1")
    before = store.index(["make.it"])
    store.blobs.delete([e.name for e in store.blobs.list("found/")])
    again = store.index(["make.it"])
    assert (again.keys, again.contents) == (before.keys, before.contents)
    assert again.keys[key("a")].digest == made.digest


def test_a_marker_without_its_manifest_is_nothing(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "a", content=key("content"), x="1")
    store.blobs.delete([f"manifests/{key('a')}.json"])
    index = store.index(["make.it"])
    assert not index.keys and not index.contents


def test_two_thousand_stored_steps_cost_a_few_listings(s3_store: Store, server: servers.Proxy, bucket: str, tmp_path: Path) -> None:
    s3 = get_backend("s3")["123456789012"]["aws"]
    steps = [f"step.{i}" for i in range(5)]
    for step in steps:
        for i in range(400):
            at = f"{step}-{i:032x}"
            s3.put_object(bucket, f"pre/fix/manifests/{at}.json", b"{}")
            s3.put_object(bucket, f"pre/fix/found/{at}/{i:032x}-{i:032x}-01234567-{i}", b"")
    server.requests.clear()
    index = s3_store.index(steps)
    assert len(index.keys) == len(index.contents) == 2000
    assert index.keys[f"step.3-{7:032x}"] == Listed(f"{7:032x}", "01234567", 7)
    assert len(server.requests) == 4, "two pages each of manifests and of markers"


@pytest.mark.parametrize("name", ["x", "0-0", "0-0-0-many", "0-0-0--1", "a-b-c-d-e", "a/b/c"])
def test_a_marker_that_says_nothing_leaves_the_word_to_the_manifest(store: Store, tmp_path: Path, name: str) -> None:
    commit(store, tmp_path, "k", x="1")
    store.blobs.delete([e.name for e in store.blobs.list("found/")])
    store.blobs.create(f"found/{key('k')}/{name}", b"")
    assert store.index(["make.it"]).keys[key("k")].bytes == 1
