"""Bytes that are read are bytes that were written: what is damaged is told, dropped, and computed again."""

import json
import os
import shutil
from pathlib import Path

import pytest

from moeflow.store import CorruptBlob, Store, repair, versions
from moeflow.store import names as store_names
from moeflow.store.checked import CHUNK
from tests import servers
from tests.making import commit, key

DATA = os.urandom(3 * CHUNK + 100)


def flip(store: Store, name: str, at: int) -> None:
    """Change one bit of a stored object, as a bad disk does."""
    data = bytearray(store.blobs.read(name))
    data[at] ^= 1
    store.blobs.delete([name])
    assert store.blobs.create(name, bytes(data))


def blob_of(store: Store, word: str, file: str = "x") -> str:
    return store_names.blob(store.manifest(key(word)).files[file].sha256)


@pytest.mark.parametrize("at", [0, CHUNK - 1, CHUNK, 2 * CHUNK + 5, len(DATA) - 1])
def test_a_flipped_bit_is_met_by_every_range_that_touches_its_chunk_and_by_no_other(store: Store, tmp_path: Path, at: int) -> None:
    commit(store, tmp_path, "k", x=DATA)
    flip(store, blob_of(store, "k"), at)
    artifact, n = store.artifact(key("k")), at // CHUNK
    for start, stop in [(at, at + 1), (n * CHUNK, n * CHUNK + 1), (max(0, n * CHUNK - 1), n * CHUNK + 1), (0, len(DATA))]:
        with pytest.raises(CorruptBlob, match="holds other bytes than were written"):
            artifact.read("x", start, stop)
    for other in {*range(4)} - {n}:
        start, stop = other * CHUNK, min((other + 1) * CHUNK, len(DATA))
        assert artifact.read("x", start, stop) == DATA[start:stop]
    with pytest.raises(CorruptBlob):
        artifact.file("x")
    with pytest.raises(CorruptBlob):
        artifact.folder()
    with pytest.raises(CorruptBlob):
        store.fetch(key("k"), tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("size", [0, CHUNK, 2 * CHUNK, len(DATA) - 1])
def test_a_file_that_is_cut_short_is_no_file(store: Store, tmp_path: Path, size: int) -> None:
    commit(store, tmp_path, "k", x=DATA)
    name = blob_of(store, "k")
    store.blobs.delete([name])
    store.blobs.create(name, DATA[:size])
    with pytest.raises(CorruptBlob):
        store.artifact(key("k")).read("x", len(DATA) - 10, len(DATA))
    with pytest.raises(CorruptBlob):
        store.artifact(key("k")).file("x")


def test_a_range_over_s3_moves_its_chunks_and_no_more(s3_store: Store, server: servers.Proxy, tmp_path: Path) -> None:
    commit(s3_store, tmp_path, "k", x=DATA)
    artifact = s3_store.artifact(key("k"))
    server.requests.clear()
    assert artifact.read("x", CHUNK + 7, CHUNK + 9) == DATA[CHUNK + 7 : CHUNK + 9]
    (asked,) = [r for r in server.requests if "blobs/" in r.path]
    assert CHUNK <= asked.received < CHUNK + 10_000
    assert artifact.reads == 2
    assert artifact.read("x", 2 * CHUNK - 5, 3 * CHUNK + 5) == DATA[2 * CHUNK - 5 : 3 * CHUNK + 5]
    assert artifact.read("x", 0, CHUNK + 5) == DATA[: CHUNK + 5]
    moved = sum(r.received for r in server.requests if "blobs/" in r.path)
    assert moved < 4 * CHUNK + 100 + 20_000, "no chunk at the end of a range is moved twice"


def test_on_a_disk_a_chunk_is_hashed_once(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    commit(store, tmp_path, "k", x=DATA)
    artifact = store.artifact(key("k"))
    before = artifact.read("x", 5, 10)
    path = store.blobs.local(blob_of(store, "k"))
    assert path is not None
    about = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:  # the same inode, size and time: only another look at the bytes could tell
        file.write(b"other")
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert artifact.read("x", 5, 10) == before
    with pytest.raises(CorruptBlob):
        artifact.file("x")


def test_a_cached_copy_that_rots_is_downloaded_again(s3_store: Store, tmp_path: Path) -> None:
    commit(s3_store, tmp_path, "k", x=DATA)
    s3_store.artifact(key("k")).file("x")
    for read in (
        lambda a: a.file("x").read_bytes(),
        lambda a: a.read("x", 0, len(DATA)),
        lambda a: (a.folder() / "x").read_bytes(),
    ):
        cached = s3_store.cache / blob_of(s3_store, "k")
        if cached.exists():
            cached.chmod(0o644)
            cached.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))
        assert read(s3_store.artifact(key("k"))) == DATA


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"size": 1', '"size": -1'),
        ('"size": 1', '"size": "1"'),
        ('"size": 1', '"size": null'),
        ('"sha256": "', '"sha256": "../'),
        ('"x": {', '"../x": {'),
        ('"x": {', '"/x": {'),
        ('"x": {', '"": {'),
        ('"x": {', '"a//x": {'),
        ('"x": {', '"y": {'),
        ('"files": {', '"files": [], "other": {'),
        ('"chunks": "', '"chunks": "00'),
        ('{\n "', '[\n "'),
        ('"x": {', '"x\\u001b[31m": {'),
        ('"version": 1', '"version": "1"'),
        ('"version": 1', '"version": true'),
        ('"seconds": 0', '"seconds": null'),
        ('"step": "make.it"', '"step": 5'),
        ('"key": "make.it', '"key": "fake.it'),
        ('"params": {}', '"params": []'),
        ('"inputs": []', '"inputs": [{"key": 7, "digest": ""}]'),
        ('"notes": []', '"notes": [7]'),
        ('"stands_for": {}', '"stands_for": []'),
        ('"stands_for": {}', '"stands_for": {"x": 7}'),
        ('"stands_for": {}', '"stands_for": {"x": "0"}'),
    ],
)
def test_a_manifest_that_lies_is_told_by_name_and_dropped_by_repair(store: Store, tmp_path: Path, old: str, new: str) -> None:
    commit(store, tmp_path, "k", x="1")
    commit(store, tmp_path, "below", inputs=(key("k"),), y="2")
    name = store_names.manifest(key("k"))
    text = store.blobs.read(name).decode()
    assert old in text
    store.blobs.delete([name])
    store.blobs.create(name, text.replace(old, new, 1).encode())
    with pytest.raises(CorruptBlob, match=f"{name} in .* is damaged|{name} in .* is cut short"):
        store.manifest(key("k"))
    damage = repair.inspect(store)
    assert [*damage.names] == [name] and {*damage.keys} == {key("below"), key("k")}
    repair.drop(store, damage.names)
    assert not store.has(key("k")) and not store.has(key("below"))


def test_inspecting_finds_what_is_rotten_missing_or_orphaned_and_what_rests_on_it(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "rotten", x=DATA)
    commit(store, tmp_path, "below", inputs=(key("rotten") + "/x",), y="2")
    commit(store, tmp_path, "lost", x="3")
    commit(store, tmp_path, "sound", x="4")
    for word in ("below", "sound"):
        versions.publish(store, word, key(word))
    assert repair.inspect(store) == repair.Damage({})
    rotten, lost = blob_of(store, "rotten"), blob_of(store, "lost")
    flip(store, rotten, 7)
    store.blobs.delete([lost])
    store.blobs.create(store_names.blob("ab" * 32), b"nobody's")
    damage = repair.inspect(store)
    assert {*damage.names} == {rotten, lost}
    assert "holds bytes with digest" in damage.names[rotten] and "is gone from" in damage.names[lost]
    assert damage.keys == tuple(sorted(map(key, ("rotten", "below", "lost"))))
    assert [v.ref for v in damage.versions] == ["below@1"]
    assert [e.name for e in damage.orphans] == [store_names.blob("ab" * 32)]
    assert repair.inspect(store, key("sound")) == repair.Damage({})
    assert [*repair.inspect(store, key("below")).names] == [rotten]
    repair.drop(store, damage.names)
    assert {*store.index(["make.it"]).keys} == {key("sound")} and store.blobs.stat(rotten) is None
    assert repair.inspect(store).names == {}


def test_on_a_disk_what_is_rotten_is_not_linked_into_something_new(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    commit(store, tmp_path, "k", x=DATA)
    links = {"x": store.manifest(key("k")).files["x"]}
    commit(store, tmp_path, "fine", links=links)
    flip(store, blob_of(store, "k"), 7)
    with pytest.raises(CorruptBlob):
        commit(store, tmp_path, "new", links=links)
    assert not store.has(key("new"))


def test_a_rotten_blob_is_replaced_when_its_bytes_are_committed_again(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    commit(store, tmp_path, "k", x=DATA)
    flip(store, blob_of(store, "k"), 0)
    commit(store, tmp_path, "again", x=DATA)
    assert store.artifact(key("k")).read("x", 0, len(DATA)) == DATA


def test_a_manifest_of_a_version_that_kept_no_digests_of_chunks_is_verified_by_whole_files(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "k", x=DATA)
    name, blob = store_names.manifest(key("k")), blob_of(store, "k")
    raw = json.loads(store.blobs.read(name))
    del raw["files"]["x"]["chunks"]
    store.blobs.delete([name])
    store.blobs.create(name, json.dumps(raw).encode())
    assert store.artifact(key("k")).read("x", 7, 11) == DATA[7:11]
    shutil.rmtree(store.cache / "blobs", ignore_errors=True)
    flip(store, blob, len(DATA) - 1)
    with pytest.raises(CorruptBlob):
        store.artifact(key("k")).read("x", 7, 11)


def test_what_was_computed_from_rotten_bytes_and_is_rotten_itself_goes_as_well(store: Store, tmp_path: Path) -> None:
    """Its bytes, computed again, are the same, and would be taken for stored."""
    commit(store, tmp_path, "a", x=b"first")
    commit(store, tmp_path, "b", inputs=(key("a"),), x=b"second")
    commit(store, tmp_path, "c", inputs=(key("a"),), x=b"third")
    for word in "ab":
        flip(store, blob_of(store, word), 2)
    rotten, whole = blob_of(store, "b"), blob_of(store, "c")
    damage = repair.drop(store, {blob_of(store, "a"): "it is rotten"})
    assert {*damage.keys} == {key("a"), key("b"), key("c")}
    assert store.blobs.stat(rotten) is None and store.blobs.stat(whole) is not None
    commit(store, tmp_path / "again", "b", inputs=(), x=b"second")
    assert store.artifact(key("b")).file("x").read_bytes() == b"second"
