"""What an interrupted step kept is there for the next run of that very step, whole or not at all."""

from pathlib import Path

import pytest

from moeflow.store import Store, partial
from moeflow.store.partial import Snapshot
from tests import servers
from tests.making import folder, key, read


def test_the_newest_state_comes_back_and_earlier_ones_are_gone(store: Store, tmp_path: Path) -> None:
    assert not partial.load(store, key("k"), tmp_path / "none") and not (tmp_path / "none").exists()
    partial.save(store, key("k"), folder(tmp_path / "1", x="1", old="old"))
    partial.save(store, key("k"), folder(tmp_path / "2", x="2", sub__y="y"))
    (tmp_path / "back").mkdir()
    assert partial.load(store, key("k"), tmp_path / "back")
    assert read(tmp_path / "back") == {"x": "2", "sub/y": "y"}
    assert len([*store.blobs.list("partial/")]) == 3
    assert not partial.load(store, key("other"), tmp_path / "none")


def test_the_step_may_go_on_changing_what_it_saved(store: Store, tmp_path: Path) -> None:
    state = folder(tmp_path / "1", x="saved")
    partial.save(store, key("k"), state)
    (state / "x").write_text("later")
    partial.load(store, key("k"), tmp_path / "back")
    assert read(tmp_path / "back") == {"x": "saved"}
    (tmp_path / "back" / "x").write_text("changed")
    partial.load(store, key("k"), tmp_path / "again")
    assert read(tmp_path / "again") == {"x": "saved"}


def test_a_file_that_did_not_change_is_not_written_again(s3_store: Store, server: servers.Proxy, tmp_path: Path) -> None:
    state = folder(tmp_path / "1", large="1" * 50_000, n="1")
    partial.save(s3_store, key("k"), state)
    server.requests.clear()
    (state / "n").write_text("2")
    partial.save(s3_store, key("k"), state)
    assert sum(r.sent for r in server.requests) < 1000
    partial.load(s3_store, key("k"), tmp_path / "back")
    assert read(tmp_path / "back") == {"large": "1" * 50_000, "n": "2"}


def test_state_that_is_not_whole_any_more_is_none(store: Store, tmp_path: Path) -> None:
    partial.save(store, key("k"), folder(tmp_path / "1", x="1", y="2"))
    files = [e.name for e in store.blobs.list("partial/") if "/files/" in e.name]
    store.blobs.delete(files[:1])
    store.blobs.create(files[0], b"wrong")
    assert not partial.load(store, key("k"), tmp_path / "back")
    store.blobs.delete(files)
    assert not partial.load(store, key("k"), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_is_dropped_is_gone(store: Store, tmp_path: Path) -> None:
    partial.save(store, key("k"), folder(tmp_path / "1", x="1"))
    partial.drop(store, key("k"))
    partial.drop(store, key("k"))
    assert not partial.load(store, key("k"), tmp_path / "back") and [*store.blobs.list("partial/")] == []


def part(store: Store, at: Path, snapshot: Snapshot, rank: int, **files: str) -> None:
    partial.save_part(store, key("k"), folder(at / f"{snapshot.at}-{snapshot.attempt}-{rank}", **files), snapshot, rank)


def gang(store: Store, to: Path) -> dict[str, str] | None:
    """What a gang would continue from."""
    return read(to) if partial.load_parts(store, key("k"), partial.snapshots(store, key("k")), to) else None


def test_a_snapshot_of_several_processes_counts_once_all_have_left_their_part(store: Store, tmp_path: Path) -> None:
    first, second = Snapshot(1, "a", 2), Snapshot(2, "a", 2)
    part(store, tmp_path, first, 0, x="x1", both="b")
    assert partial.snapshots(store, key("k")) == [] and gang(store, tmp_path / "none") is None
    part(store, tmp_path, first, 1, y="y1", both="b")
    part(store, tmp_path, second, 1, y="y2")
    assert partial.snapshots(store, key("k")) == [first]
    assert gang(store, tmp_path / "one") == {"x": "x1", "y": "y1", "both": "b"}
    part(store, tmp_path, second, 0, x="x2")
    assert partial.snapshots(store, key("k")) == [second]
    assert gang(store, tmp_path / "two") == {"x": "x2", "y": "y2"}


def test_older_parts_go_when_a_newer_snapshot_is_whole(store: Store, tmp_path: Path) -> None:
    for at in range(1, 6):
        for rank in (0, 1):
            part(store, tmp_path, Snapshot(at, "a", 2), rank, **{f"n{rank}": str(at), f"same{rank}": "same"})
    complete = partial.snapshots(store, key("k"))
    assert complete[0].at == 5 and len(complete) <= 2
    assert gang(store, tmp_path / "back") == {"n0": "5", "n1": "5", "same0": "same", "same1": "same"}
    left = [e.name for e in store.blobs.list("partial/")]
    assert len([n for n in left if "/00001/" in n]) == 3, "a part, and its two files"


def test_parts_of_two_starts_make_no_snapshot(store: Store, tmp_path: Path) -> None:
    part(store, tmp_path, Snapshot(7, "a", 2), 0, x="killed before the other saved")
    part(store, tmp_path, Snapshot(7, "b", 2), 1, y="of another start")
    assert partial.snapshots(store, key("k")) == []
    part(store, tmp_path, Snapshot(7, "b", 2), 0, x="x")
    assert gang(store, tmp_path / "back") == {"x": "x", "y": "of another start"}
    assert not [e for e in store.blobs.list("partial/") if "/a/" in e.name], "what it replaces went"


def test_a_gang_that_came_further_is_not_replaced_by_one_that_did_not(store: Store, tmp_path: Path) -> None:
    part(store, tmp_path, Snapshot(9, "a", 1), 0, x="nine")
    part(store, tmp_path, Snapshot(2, "b", 2), 1, y="two")
    part(store, tmp_path, Snapshot(2, "b", 2), 0, x="two")
    assert partial.snapshots(store, key("k")) == [Snapshot(9, "a", 1), Snapshot(2, "b", 2)]
    part(store, tmp_path, Snapshot(10, "b", 2), 1, y="ten")
    part(store, tmp_path, Snapshot(10, "b", 2), 0, x="ten")
    assert {s.attempt for s in partial.snapshots(store, key("k"))} == {"b"}


def test_a_snapshot_that_lost_a_file_gives_way_to_the_one_before(store: Store, tmp_path: Path) -> None:
    for at in (1, 2):
        for rank in (1, 0):  # so that the older is still there
            part(store, tmp_path, Snapshot(at, "ab"[at - 1], 2), rank, **{f"n{rank}": str(at)})
        if at == 1:
            kept = {e.name: store.blobs.read(e.name) for e in store.blobs.list("partial/")}
    for name, data in kept.items():
        store.blobs.create(name, data)
    (gone,) = [e.name for e in store.blobs.list("partial/") if "/b/00001/files/" in e.name]
    store.blobs.delete([gone])
    assert len(partial.snapshots(store, key("k"))) == 2
    assert gang(store, tmp_path / "back") == {"n0": "1", "n1": "1"}


def test_two_processes_with_different_files_of_one_name_are_refused(store: Store, tmp_path: Path) -> None:
    for rank in (0, 1):
        part(store, tmp_path, Snapshot(1, "a", 2), rank, state=f"of {rank}")
    with pytest.raises(ValueError, match="different files as 'state'; give each names of its own"):
        gang(store, tmp_path / "back")


def test_what_a_gang_left_and_what_a_step_alone_left_are_not_mixed(store: Store, tmp_path: Path) -> None:
    part(store, tmp_path, Snapshot(1, "a", 1), 0, x="gang")
    partial.save(store, key("k"), folder(tmp_path / "1", x="alone"))
    partial.save(store, key("k"), folder(tmp_path / "2", x="alone again"))
    part(store, tmp_path, Snapshot(2, "a", 1), 0, x="gang again")
    assert partial.load(store, key("k"), tmp_path / "alone") and read(tmp_path / "alone") == {"x": "alone again"}
    assert gang(store, tmp_path / "gang") == {"x": "gang again"}
    partial.drop(store, key("k"))
    assert [*store.blobs.list("partial/")] == []


def test_a_part_of_which_nothing_changed_is_not_written_again(s3_store: Store, server: servers.Proxy, tmp_path: Path) -> None:
    part(s3_store, tmp_path, Snapshot(1, "a", 1), 0, large="1" * 50_000)
    server.requests.clear()
    part(s3_store, tmp_path, Snapshot(2, "a", 1), 0, large="1" * 50_000)
    assert sum(r.sent for r in server.requests) < 1000
    assert gang(s3_store, tmp_path / "back") == {"large": "1" * 50_000}
