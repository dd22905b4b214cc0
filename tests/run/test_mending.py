"""A run that meets damaged bytes drops them with everything computed from them, says so, and ends with the right result."""

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from moeflow.run import Options, StepFailed
from moeflow.run.go import Runner, go, prepare
from moeflow.run.progress import Lines
from moeflow.step import Part, Step
from moeflow.store import Index, Store, names, repair
from tests import servers
from tests.run import toy
from tests.store.test_damage import flip

Go = Callable[[Step, Store], tuple[str, str]]


@pytest.fixture(params=["process", "ray"])
def publish(request: pytest.FixtureRequest) -> Go:
    """Run a target as `moeflow run` does; return the version and what was shown."""
    if request.param == "ray":
        request.getfixturevalue("local_ray")

    def publish(target: Step, store: Store) -> tuple[str, str]:
        shown = io.StringIO()
        prepared = prepare(target, store, name="toy", runner=Runner(request.param))
        _, n = go(prepared, progress=Lines(shown), options=Options(), record={})
        return f"toy@{n}", shown.getvalue()

    return publish


def blob_of(store: Store, step: Step) -> str:
    (file,) = store.manifest(step.key).files.values()
    return names.blob(file.sha256)


def answer(store: Store, step: Step) -> int:
    return int(store.artifact(step.key).file("n").read_text())


def test_a_rotten_input_is_computed_again_with_everything_behind_it(publish: Go, store: Store) -> None:
    numbers = [toy.number(n=n) for n in (6, 7)]
    publish(toy.total(*numbers), store)
    before = {s.key: store.manifest(s.key).created for s in numbers}
    flip(store, blob_of(store, numbers[0]), 7)
    another = toy.total(*numbers, size=9)
    version, shown = publish(another, store)
    assert version == "toy@2" and answer(store, another) == 13
    assert "holds bytes with digest" in shown and "dropped with 2 results that rest on it, and so toy@1" in shown
    assert store.manifest(numbers[0].key).created > before[numbers[0].key]
    assert store.manifest(numbers[1].key).created == before[numbers[1].key]
    assert not store.has(toy.total(*numbers).key), "what was computed from the rotten bytes is not stored any more"


def test_a_blob_that_is_gone_is_computed_again(publish: Go, store: Store) -> None:
    publish(toy.total(toy.number(n=6)), store)
    store.blobs.delete([blob_of(store, toy.number(n=6))])
    another = toy.total(toy.number(n=6), size=9)
    publish(another, store)
    assert answer(store, another) == 6


def test_a_manifest_that_is_damaged_is_computed_again(publish: Go, store: Store) -> None:
    publish(toy.total(toy.number(n=6)), store)
    name = names.manifest(toy.number(n=6).key)
    cut = store.blobs.read(name)[:-20]
    store.blobs.delete([name])
    store.blobs.create(name, cut)
    another = toy.total(toy.number(n=6), size=9)
    _, shown = publish(another, store)
    assert answer(store, another) == 6 and "is cut short" in shown


@pytest.mark.parametrize("publish", ["process", pytest.param("ray", marks=pytest.mark.slow)], indirect=True)
def test_several_rotten_blobs_are_all_replaced(publish: Go, store: Store) -> None:
    numbers = [toy.number(n=n) for n in range(5)]
    publish(toy.total(*numbers), store)
    for number in numbers:
        flip(store, blob_of(store, number), 0)
    another = toy.total(*numbers, size=9)
    publish(another, store)
    assert answer(store, another) == 10


def test_a_disk_that_spoils_what_is_written_again_ends_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    number = toy.number(n=6)
    prepared = prepare(toy.total(number), store, name="toy", runner=Runner.process)
    upload = type(store.blobs).upload

    def spoil(blobs: object, path: Path, name: str, *, take: bool = False) -> None:
        path.chmod(0o644)
        path.write_text(path.read_text().replace("6", "7"))
        upload(store.blobs, path, name, take=take)

    monkeypatch.setattr(type(store.blobs), "upload", spoil)
    with pytest.raises(StepFailed, match="holds bytes with digest"):
        go(prepared, progress=Lines(io.StringIO()), options=Options(), record={})


def test_on_s3_a_range_is_verified_too(server: servers.Proxy, s3_url: str, tmp_path: Path) -> None:
    store = Store.open(s3_url, tmp_path / "cache")
    number = toy.number(n=6, size=100)
    quietly(toy.slice_(number, start=90, stop=100), store)
    flip(store, blob_of(store, number), 99)
    another = toy.slice_(number, start=95, stop=100)
    assert "holds other bytes than were written" in quietly(another, store)
    assert answer(store, another) == 6


@pytest.mark.parametrize("kind", ["linked", "written again", "stored whole"])
def test_on_s3_a_rotten_blob_that_a_run_only_takes_over_is_never_published(s3_url: str, tmp_path: Path, kind: str) -> None:
    s3_store = Store.open(s3_url, tmp_path / "cache")
    numbers = [toy.number(n=n) for n in (6, 7)]
    made = toy.assemble(*numbers)
    quietly(made, s3_store)
    flip(s3_store, blob_of(s3_store, numbers[0]), 7)
    more, half = toy.assemble(*numbers, toy.number(n=8)), toy.half(toy.number(n=12))
    target = {"linked": more, "written again": half, "stored whole": made}[kind]
    shown = quietly(target, s3_store, "another")
    assert "holds bytes with digest" in shown and "to be computed again" in shown
    assert not repair.inspect(s3_store, target.key).names


def test_on_s3_only_what_the_run_did_not_write_is_read_to_be_published(server: servers.Proxy, s3_url: str, tmp_path: Path) -> None:
    store = Store.open(s3_url, tmp_path / "cache")
    numbers = [toy.number(n=n, size=1000 + n) for n in (6, 7)]
    quietly(toy.assemble(*numbers), store)
    assert not server.count("GET", "/blobs/")
    quietly(toy.assemble(*numbers, toy.number(n=8)), store)
    assert server.count("GET", "/blobs/") == 2


def quietly(target: Step, store: Store, name: str = "a") -> str:
    shown = io.StringIO()
    go(prepare(target, store, name=name, runner=Runner.process), progress=Lines(shown), options=Options(), record={})
    return shown.getvalue()


def test_what_is_deleted_between_listing_and_reading_is_planned_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As garbage collection does that began before the run left its mark."""
    values = toy.shards(values=[3, 4])
    target = toy.read(Part(values, "shard-1"))
    prepare(target, store, name="toy", runner=Runner.process).mark.end()
    go(prepare(values, store, name="values", runner=Runner.process), progress=Lines(io.StringIO()), options=Options(), record={})
    listed, index = [], Store.index

    def listing(self: Store, steps: Iterable[str]) -> Index:
        found = index(self, steps)
        if not listed:
            store.blobs.delete([names.manifest(values.key)])
        listed.append(found)
        return found

    monkeypatch.setattr(Store, "index", listing)
    prepared = prepare(target, store, name="toy", runner=Runner.process)
    assert len(listed) == 2 and len(prepared.plan.keys("run")) == 2
    prepared.mark.end()
