"""What an interrupted step kept is there for the next run of that very step, whole or not at all."""

from pathlib import Path

from moeflow.store import Store
from tests import servers
from tests.store.making import folder, key, read


def test_the_newest_state_comes_back_and_earlier_ones_are_gone(store: Store, tmp_path: Path) -> None:
    assert not store.load_partial(key("k"), tmp_path / "none") and not (tmp_path / "none").exists()
    store.save_partial(key("k"), folder(tmp_path / "1", x="1", old="old"))
    store.save_partial(key("k"), folder(tmp_path / "2", x="2", sub__y="y"))
    (tmp_path / "back").mkdir()
    assert store.load_partial(key("k"), tmp_path / "back")
    assert read(tmp_path / "back") == {"x": "2", "sub/y": "y"}
    assert len([*store.blobs.list("partial/")]) == 3
    assert not store.load_partial(key("other"), tmp_path / "none")


def test_the_step_may_go_on_changing_what_it_saved(store: Store, tmp_path: Path) -> None:
    state = folder(tmp_path / "1", x="saved")
    store.save_partial(key("k"), state)
    (state / "x").write_text("later")
    store.load_partial(key("k"), tmp_path / "back")
    assert read(tmp_path / "back") == {"x": "saved"}
    (tmp_path / "back" / "x").write_text("changed")
    store.load_partial(key("k"), tmp_path / "again")
    assert read(tmp_path / "again") == {"x": "saved"}


def test_a_file_that_did_not_change_is_not_written_again(s3_store: Store, server: servers.Proxy, tmp_path: Path) -> None:
    state = folder(tmp_path / "1", large="1" * 50_000, n="1")
    s3_store.save_partial(key("k"), state)
    server.requests.clear()
    (state / "n").write_text("2")
    s3_store.save_partial(key("k"), state)
    assert sum(r.sent for r in server.requests) < 1000
    s3_store.load_partial(key("k"), tmp_path / "back")
    assert read(tmp_path / "back") == {"large": "1" * 50_000, "n": "2"}


def test_state_that_is_not_whole_any_more_is_none(store: Store, tmp_path: Path) -> None:
    store.save_partial(key("k"), folder(tmp_path / "1", x="1", y="2"))
    files = [e.name for e in store.blobs.list("partial/") if "/files/" in e.name]
    store.blobs.delete(files[:1])
    store.blobs.create(files[0], b"wrong")
    assert not store.load_partial(key("k"), tmp_path / "back")
    store.blobs.delete(files)
    assert not store.load_partial(key("k"), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_is_dropped_is_gone(store: Store, tmp_path: Path) -> None:
    store.save_partial(key("k"), folder(tmp_path / "1", x="1"))
    store.drop_partial(key("k"))
    store.drop_partial(key("k"))
    assert not store.load_partial(key("k"), tmp_path / "back") and [*store.blobs.list("partial/")] == []
