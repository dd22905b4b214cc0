"""What every store promises, on a disk and in a bucket alike."""

import json
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from moeflow.store import CorruptBlob, File, Manifest, NotStored, Store, StoreError, part_digest, repair
from moeflow.store import names as store_names
from tests import servers
from tests.making import commit, folder, key, read, record


def test_what_was_committed_comes_back(store: Store, tmp_path: Path) -> None:
    assert not store.has(key("k"))
    made = commit(store, tmp_path, "k", x="1", sub__y="22", empty="")
    assert made.first and (made.bytes_written, made.bytes) == (3, 3)
    assert store.has(key("k"))
    artifact = store.artifact(key("k"))
    assert artifact.names() == ["empty", "sub/y", "x"] and artifact.size("sub/y") == 2
    assert artifact.file("sub/y").read_text() == "22" and artifact.read("sub/y", 1, 9) == b"2"
    assert read(artifact.folder()) == {"x": "1", "sub/y": "22", "empty": ""}


def test_the_first_commit_stands_and_the_second_writer_learns_of_it(store: Store, tmp_path: Path) -> None:
    first = commit(store, tmp_path / "1", "k", x="first")
    second = commit(store, tmp_path / "2", "k", x="second")
    assert first.first and not second.first and second.digest == first.digest
    assert store.artifact(key("k")).file("x").read_text() == "first"


def test_of_eight_writers_at_once_one_wins_and_all_name_its_contents(store: Store, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        done = [*pool.map(lambda i: commit(store, tmp_path / str(i), "k", x=str(i), same="same"), range(8))]
    assert sum(d.first for d in done) == 1
    assert {d.digest for d in done} == {store.manifest(key("k")).digest}
    assert store.artifact(key("k")).file("x").read_text() == str([d.first for d in done].index(True))


def test_the_record_says_how_an_artifact_came_to_be(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "k", inputs=(key("up"), key("up") + "/layer"), content=key("c"), source="ab" * 32, x="1")
    manifest = store.manifest(key("k"))
    assert (manifest.step, manifest.version, manifest.content, manifest.source) == ("make.it", 1, key("c"), "ab" * 32)
    assert [i.key for i in manifest.inputs] == [key("up"), key("up") + "/layer"]
    assert manifest.created.endswith("+00:00") and manifest.same_as == "" and manifest.bytes == 1
    assert Manifest.load(manifest.dump()) == manifest
    plain = json.loads(store.blobs.read(f"manifests/{key('k')}.json"))
    assert plain["digest"] == manifest.digest and plain["files"]["x"]["size"] == 1


def test_the_digest_is_of_contents_and_names_and_stays_what_it_was(store: Store, tmp_path: Path) -> None:
    one = commit(store, tmp_path, "1", inputs=("a",), x="1", y="2")
    two = commit(store, tmp_path, "2", inputs=("b",), y="2", x="1")
    other = commit(store, tmp_path, "3", x="2", y="1")
    assert one.digest == two.digest != other.digest
    assert one.digest == "70ba2fb571631a72c8b8695207527c0a"


def test_equal_files_are_stored_once(store: Store, tmp_path: Path) -> None:
    assert commit(store, tmp_path, "1", a="same", b="same", c="x").bytes_written == 5
    assert commit(store, tmp_path, "2", d="same").bytes_written == 0
    assert len([*store.blobs.list("blobs/")]) == 2


def test_a_linked_file_joins_the_output_without_moving(s3_store: Store, server: servers.Proxy, tmp_path: Path) -> None:
    commit(s3_store, tmp_path, "in", shard="x" * 10_000)
    files = s3_store.artifact(key("in")).files
    server.requests.clear()
    made = commit(s3_store, tmp_path, "out", inputs=(key("in"),), links={"model/shard": files["shard"]}, y="1")
    assert made.bytes == 10_001 and made.bytes_written == 1
    assert sum(r.sent + r.received for r in server.requests if "blobs/" in r.path) == 1
    assert s3_store.artifact(key("out")).read("model/shard", 0, 3) == b"xxx"


def test_a_name_that_is_written_and_linked_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x is both written and linked"):
        commit(store, tmp_path, "k", links={"x": File("0" * 64, 1)}, x="1")


def test_linking_a_blob_that_is_gone_names_it(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "in", x="1")
    file = store.artifact(key("in")).files["x"]
    store.blobs.delete([store_names.blob(file.sha256)])
    with pytest.raises(CorruptBlob, match=f"{store_names.blob(file.sha256)} is gone from .*; `moeflow verify"):
        commit(store, tmp_path, "out", inputs=(key("in"),), links={"x": file})
    assert not store.has(key("out"))


def test_an_alias_holds_the_same_files_and_moves_none(s3_store: Store, server: servers.Proxy, tmp_path: Path) -> None:
    made = commit(s3_store, tmp_path, "k", content=key("c"), x="1" * 5000)
    server.requests.clear()
    again = s3_store.alias(key("k2"), key("k"), record(inputs=("other",), content=key("c")))
    assert again.digest == made.digest and again.bytes_written == 0
    assert not server.count(path="blobs/")
    assert s3_store.manifest(key("k2")).same_as == key("k")
    assert s3_store.artifact(key("k2")).read("x", 0, 2) == b"11"
    s3_store.alias(key("k3"), key("k2"), record())
    assert s3_store.manifest(key("k3")).same_as == key("k")


def test_a_part_is_the_files_that_begin_so_with_a_digest_of_their_own(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "1", layer0__w="a", layer1__w="b")
    commit(store, tmp_path, "2", layer0__w="a", layer1__w="changed")
    one, two = store.artifact(key("1"), "layer0/"), store.artifact(key("2") + "/layer0/")
    assert one.names() == two.names() == ["layer0/w"]
    first, second = store.manifest(key("1")), store.manifest(key("2"))
    assert one.key == key("1") + "/layer0/"
    assert part_digest(first, "layer0/") == part_digest(second, "layer0/") != first.digest


def test_bytes_asked_of_an_artifact_are_counted_once_per_file_and_range(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "k", x="0123456789", y="12345")
    artifact = store.artifact(key("k"))
    artifact.read("x", 0, 4)
    artifact.read("x", 0, 4)
    artifact.read("x", 8, 99)
    assert artifact.reads == 6
    artifact.file("y")
    artifact.read("y", 0, 2)
    artifact.file("y")
    assert artifact.reads == 11


def test_a_file_that_an_artifact_does_not_have_is_answered_with_those_it_has(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "k", x="1", y="2")
    for ask in (store.artifact(key("k")).file, store.artifact(key("k")).size):
        with pytest.raises(FileNotFoundError, match="has no file 'z'; it has: x, y"):
            ask("z")


def test_a_key_that_is_not_stored_says_what_to_do(store: Store) -> None:
    with pytest.raises(KeyError) as caught:
        store.manifest(key("none"))
    assert isinstance(caught.value, NotStored)
    assert str(caught.value).startswith(f"{key('none')} is not stored in {store.url}; run the pipeline")


def test_many_manifests_are_read_at_once_and_missing_ones_left_out(store: Store, tmp_path: Path) -> None:
    for word in "ab":
        commit(store, tmp_path, word, x=word)
    assert {*store.manifests([key("a"), key("b"), key("c")])} == {key("a"), key("b")}


def test_a_store_pickles_and_opens_from_its_address(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "k", x="1")
    for other in (pickle.loads(pickle.dumps(store)), Store.open(store.url, tmp_path / "elsewhere")):
        assert other.artifact(key("k")).file("x").read_text() == "1"


def test_the_default_cache_is_that_of_the_node_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = [pickle.dumps(Store.open("s3://bucket/x", cache)) for cache in (None, tmp_path / "given")]
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "there"))
    assert [pickle.loads(s).cache for s in sent] == [tmp_path / "there", tmp_path / "given"]


def test_the_default_cache_lies_in_a_folder_store_and_in_the_home_of_others(tmp_path: Path) -> None:
    assert Store.open(str(tmp_path)).cache == tmp_path / "cache"
    assert Store.open("s3://bucket/x").cache == Path(os.environ["MOEFLOW_CACHE"])


def test_pull_copies_what_may_then_be_changed_without_harm(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "k", x="1", sub__y="2")
    store.fetch(key("k"), tmp_path / "pulled")
    assert read(tmp_path / "pulled") == {"x": "1", "sub/y": "2"}
    for path in (tmp_path / "pulled").rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o200 and path.stat().st_nlink == 1
            path.write_text("spoilt")
    assert store.artifact(key("k")).file("x").read_text() == "1"
    (tmp_path / "empty").mkdir()
    store.fetch(key("k") + "/sub/", tmp_path / "empty")
    assert read(tmp_path / "empty") == {"sub/y": "2"}


def test_pull_into_a_folder_that_holds_something_is_refused(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "k", x="1")
    with pytest.raises(FileExistsError, match="is not empty; name a folder that does not exist yet"):
        store.fetch(key("k"), folder(tmp_path / "full", y="2"))


def test_rotten_bytes_are_refused_and_dropping_them_mends_the_store(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "k", x="right")
    blob = store_names.blob(store.manifest(key("k")).files["x"].sha256)
    store.blobs.delete([blob])
    store.blobs.create(blob, b"wrong")
    artifact = store.artifact(key("k"))
    for ask in (lambda: artifact.file("x"), artifact.folder, lambda: store.fetch(key("k"), tmp_path / "out")):
        with pytest.raises(CorruptBlob, match=f"{blob} holds bytes with digest .*; `moeflow verify --all --repair`"):
            ask()
    assert not (tmp_path / "out").exists()
    assert repair.drop(store, {blob: "rotten"}).keys == (key("k"),)
    assert key("k") not in store.index(["make.it"]).keys
    shutil.rmtree(tmp_path / "made")
    assert commit(store, tmp_path, "k", x="right").first
    assert store.artifact(key("k")).file("x").read_text() == "right"


def test_a_blob_that_was_cut_short_is_written_again(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "k", x="right")
    blob = store_names.blob(store.manifest(key("k")).files["x"].sha256)
    store.blobs.delete([blob])
    store.blobs.create(blob, b"ri")
    assert commit(store, tmp_path / "again", "k2", x="right").bytes_written == 5
    assert store.artifact(key("k")).file("x").read_text() == "right"


def test_a_blob_that_is_gone_is_said_to_be(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "k", x="right")
    store.blobs.delete([store_names.blob(store.manifest(key("k")).files["x"].sha256)])
    artifact = store.artifact(key("k"))
    for ask in (lambda: artifact.file("x"), lambda: artifact.read("x", 0, 2), artifact.folder):
        with pytest.raises((CorruptBlob, FileNotFoundError)):
            ask()


def test_a_manifest_that_was_cut_short_says_so(store: Store) -> None:
    store.blobs.create(f"manifests/{key('k')}.json", b'{"key"')
    with pytest.raises(CorruptBlob, match=f"manifests/{key('k')}.json in .* is cut short; `moeflow verify"):
        store.manifest(key("k"))


def test_what_would_be_lost_is_not_committed(store: Store, tmp_path: Path) -> None:
    (folder(tmp_path / "made" / "k", x="1") / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="link is neither a file nor a folder of its own"):
        commit(store, tmp_path, "k", y="1")
    assert not store.has(key("k"))


def test_a_name_that_a_terminal_would_obey_is_not_committed(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder can take a file named '\\x1b\[31mred'; give it another name"):
        commit(store, tmp_path, "k", **{"\x1b[31mred": "1"})
    assert not store.has(key("k"))


def test_a_manifest_whose_names_leave_the_folder_is_refused(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "k", x="1")
    spoilt = store.blobs.read(f"manifests/{key('k')}.json").replace(b'"x"', b'"../../x"')
    store.blobs.create(f"manifests/{key('evil')}.json", spoilt)
    with pytest.raises(CorruptBlob, match="leaves the folder"):
        store.artifact(key("evil"))


def test_a_commit_that_relies_on_an_old_blob_renews_its_age(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    commit(store, tmp_path, "k", x="1", y="2")
    files = store.manifest(key("k")).files
    for path in (tmp_path / "store").rglob("*"):
        os.utime(path, (0, 0))
    commit(store, tmp_path / "again", "k2", links={"y": files["y"]}, x="1")
    for file in files.values():
        assert (tmp_path / "store" / store_names.blob(file.sha256)).stat().st_mtime > time.time() - 86400
    store.renew([key("k")], store.index(["make.it"]))
    assert store.index(["make.it"]).modified[key("k")] > time.time() - 86400


def test_old_blobs_in_s3_are_touched_by_the_server_alone(s3_store: Store, server: servers.Proxy, tmp_path: Path) -> None:
    commit(s3_store, tmp_path, "k", x="1" * 10_000)
    blob = store_names.blob(s3_store.manifest(key("k")).files["x"].sha256)
    server.requests.clear()
    s3_store.blobs.touch(blob)
    assert sum(r.sent for r in server.requests) == 0
    assert s3_store.blobs.read(blob) == b"1" * 10_000


def test_an_upload_that_fails_leaves_nothing_under_the_key(s3_store: Store, server: servers.Proxy, tmp_path: Path) -> None:
    denied = servers.Fault(403, "AccessDenied")
    server.fault = lambda method, path: denied if method == "PUT" and "blobs" in path else None
    with pytest.raises(StoreError, match="no permission for PutObject"):
        commit(s3_store, tmp_path, "k", x="1", y="2")
    server.reset()
    assert not s3_store.has(key("k")) and not s3_store.index(["make.it"]).keys
    assert commit(s3_store, tmp_path, "k", x="1", y="2").first


def test_an_upload_cut_short_is_repeated_and_arrives_whole(s3_store: Store, server: servers.Proxy, tmp_path: Path) -> None:
    cuts = iter([servers.Fault(hang_up=True)])
    server.fault = lambda method, path: next(cuts, None) if method == "PUT" and "blobs" in path else None
    commit(s3_store, tmp_path, "k", x="1" * 10_000)
    assert s3_store.artifact(key("k")).file("x").read_text() == "1" * 10_000


def test_a_note_counts_as_the_files_that_it_stands_for(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "file", x="weights")
    file = store.manifest(key("file")).files["x"]
    about = replace(record(), stands_for={"x": file.sha256})
    note = store.commit(key("note"), folder(tmp_path / "note", **{"where.json": "{}"}), record=about)
    assert note.digest == store.manifest(key("note")).digest == store.manifest(key("file")).digest
    assert store.artifact(key("note")).names() == ["where.json"], "its own files are what is stored, fetched and verified"
    assert store.index(["make.it"]).keys[key("note")].digest == note.digest
    assert store.alias(key("again"), key("note"), record()).digest == note.digest
