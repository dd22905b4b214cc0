"""Names people use are small records that are never changed."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moeflow.store import CorruptBlob, NotStored, Store, labels, versions
from tests.making import commit, key


def key_of(store: Store, ref: str) -> str:
    """The key that `ref` means."""
    target = versions.resolve(store, ref)
    return target if isinstance(target, str) else target.key


@pytest.fixture
def filled(store: Store, tmp_path: Path) -> Store:
    for word in "abc":
        commit(store, tmp_path, word, x=word)
    return store


def test_versions_count_up_and_the_newest_is_not_published_twice(filled: Store) -> None:
    assert versions.publish(filled, "tiny", key("a"), record={"keep": 6}) == 1
    assert versions.publish(filled, "tiny", key("a"), record={"keep": 6}) == 1
    assert versions.publish(filled, "tiny", key("b"), record={}) == 2
    assert versions.publish(filled, "tiny", key("a"), record={}) == 3
    assert [(v.ref, v.key) for v in versions.list(filled)] == [
        ("tiny@1", key("a")), ("tiny@2", key("b")), ("tiny@3", key("a"))
    ]  # fmt: skip
    assert versions.list(filled)[0].record == {"keep": 6}


def test_another_report_makes_another_version(filled: Store) -> None:
    assert versions.publish(filled, "tiny", key("a"), reports=[key("b")]) == 1
    assert versions.publish(filled, "tiny", key("a"), reports=[key("b")]) == 1
    assert versions.publish(filled, "tiny", key("a"), reports=[key("b"), key("c")]) == 2
    assert versions.list(filled, "tiny")[1].reports == (key("b"), key("c"))


def test_many_publishers_at_once_get_a_number_each(filled: Store) -> None:
    with ThreadPoolExecutor(6) as pool:
        numbers = [*pool.map(lambda i: versions.publish(filled, "tiny", key("abc"[i % 3]), reports=[str(i)]), range(6))]
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6]


def test_a_reference_is_a_version_a_name_a_label_a_key_or_how_one_key_begins(filled: Store) -> None:
    versions.publish(filled, "tiny", key("a"))
    versions.publish(filled, "tiny", key("b"))
    versions.promote(filled, "tiny@1", "best")
    assert [key_of(filled, r) for r in ("tiny@1", "tiny", "best", key("c"), key("c")[:-1] + "3")] == [
        key("a"), key("b"), key("a"), key("c"), key("c")
    ]  # fmt: skip
    version = versions.resolve(filled, "tiny")
    assert isinstance(version, versions.Version) and (version.ref, version.key) == ("tiny@2", key("b"))
    assert versions.resolve(filled, key("c")) == key("c")


def test_what_a_reference_cannot_mean_is_answered_with_what_it_could(filled: Store) -> None:
    versions.publish(filled, "tiny", key("a"))
    with pytest.raises(NotStored, match=r"tiny@7 is not in .*; the newest is tiny@1"):
        versions.resolve(filled, "tiny@7")
    with pytest.raises(NotStored, match="there is no version of other"):
        versions.resolve(filled, "other@1")
    with pytest.raises(NotStored, match="'nothing' is no version, label or key in"):
        versions.resolve(filled, "nothing")
    versions.promote(filled, "tiny@1", "production")
    for meant, written in (("tiny", "tinny"), ("tiny", "tinny@1"), ("production", "producton")):
        with pytest.raises(NotStored, match=f"; did you mean {meant}[?]$"):
            versions.resolve(filled, written)
    with pytest.raises(ValueError, match="a version is a number, as in tiny@1"):
        versions.resolve(filled, "tiny@best")
    with pytest.raises(ValueError, match=r"is how several keys begin: make.it-0.*write more of the key"):
        versions.resolve(filled, "make.it-0")


def test_a_label_moves_and_moving_it_back_and_forth_is_kept(filled: Store) -> None:
    for word in "ab":
        versions.publish(filled, "tiny", key(word))
    for ref in ("tiny@1", "tiny@1", "tiny@2", "tiny@1"):
        versions.promote(filled, ref, "best")
    assert key_of(filled, "best") == key("a")
    assert len([*filled.blobs.list("labels/best/")]) == 3
    assert [(v.ref, v.labels) for v in versions.list(filled)] == [("tiny@1", ("best",)), ("tiny@2", ())]


def test_a_label_whose_records_are_deleted_meanwhile_is_moved_and_rolled_back_all_the_same(filled: Store) -> None:
    for word in "ab":
        versions.publish(filled, "tiny", key(word))
    for since, ref in enumerate(("tiny@1", "tiny@2", "tiny@1")):
        labels.move(filled, "best", ref, since=since)
    filled.blobs.delete(["labels/best/000002.json"])
    assert [m.n for m in labels.history(filled, "best")] == [1, 3]
    assert versions.rollback(filled, "best").ref == "tiny@1", "back to the move that is still there"
    filled.blobs.delete([e.name for e in filled.blobs.list("labels/")])
    assert labels.last(filled, "best") is None and not labels.pointing(filled)
    assert labels.move(filled, "best", "tiny@2", since=4).n == 5, "by who had looked before they were deleted"
    with pytest.raises(NotStored, match="best has pointed at nothing before tiny@2"):
        versions.rollback(filled, "best")


def test_only_versions_are_promoted_and_never_onto_a_name(filled: Store) -> None:
    versions.publish(filled, "tiny", key("a"))
    with pytest.raises(ValueError, match="only versions are promoted"):
        versions.promote(filled, key("a"), "best")
    with pytest.raises(ValueError, match="'tiny' is the name of versions; choose another label"):
        versions.promote(filled, "tiny@1", "tiny")


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a@1", "-a", "a" * 129, "a b"])
def test_a_name_that_would_not_be_one_is_refused(filled: Store, name: str) -> None:
    with pytest.raises(ValueError, match="use at most 128 letters, digits"):
        versions.publish(filled, name, key("a"))


def test_what_is_not_stored_is_not_published(store: Store) -> None:
    with pytest.raises(NotStored, match="so it cannot be published as tiny"):
        versions.publish(store, "tiny", key("none"))


def test_lineage_is_everything_upstream_once_with_its_parameters(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "model", x="1")
    commit(store, tmp_path, "layer", inputs=(key("model") + "/layer0",), x="2")
    commit(store, tmp_path, "out", inputs=(key("layer"), key("model")), x="3")
    commit(store, tmp_path, "other", x="4")
    version = versions.lineage(store, key("out"))
    assert [*version] == [key("out"), key("layer"), key("model")]
    assert version[key("layer")].inputs[0].key == key("model") + "/layer0"
    with pytest.raises(NotStored):
        versions.lineage(store, key("none"))


@pytest.mark.parametrize(
    "record", ["", "[]", "null", "{}", '{"name": 1}', '{"name": "m", "n": "1", "key": 7}', "\xff", '{"name": "m']
)
def test_a_damaged_record_of_a_version_or_a_label_is_told_by_name(filled: Store, record: str) -> None:
    versions.publish(filled, "m", key("a"))
    versions.promote(filled, "m@1", "production")
    for at, asked in (("versions/m/000001.json", "m@1"), ("labels/production/000001.json", "production")):
        whole = filled.blobs.read(at)
        filled.blobs.delete([at])
        filled.blobs.create(at, record.encode("latin-1"))
        with pytest.raises(CorruptBlob, match=f"{at} in .* is damaged .*; restore or delete it"):
            versions.resolve(filled, asked)
        filled.blobs.delete([at])
        filled.blobs.create(at, whole)


def test_what_is_no_record_among_the_versions_is_passed_over(filled: Store) -> None:
    filled.blobs.create("versions/m/notes.json", b"?")
    assert versions.publish(filled, "m", key("a")) == 1
    assert [v.ref for v in versions.list(filled)] == ["m@1"]
