"""What goes with a version, what stays for the newest, and what no deletion touches while a run relies on it."""

import os
import time
from datetime import datetime
from email.utils import formatdate
from pathlib import Path

import pytest

from moeflow.store import NotStored, Store, runs, versions
from moeflow.store.gc import Policy, delete, gc
from tests import servers
from tests.making import commit, key


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Four versions `m@1` to `m@4`, each of a calibration of the same source; the second is labelled."""
    made = Store.open(str(tmp_path / "store")) if request.param == "disk" else request.getfixturevalue("s3_store")
    commit(made, tmp_path, "source", x="s" * 1000)
    for n in range(1, 5):
        commit(made, tmp_path, f"stat{n}", inputs=(key("source"),), x=f"{n}" * 100)
        commit(made, tmp_path, f"out{n}", inputs=(key(f"stat{n}"),), x=f"{n}" * 10)
        versions.publish(made, "m", key(f"out{n}"))
    versions.promote(made, "m@2", "production")
    return made


def stored(store: Store) -> set[str]:
    return {*store.index(["make.it"]).keys}


def refs(store: Store) -> list[str]:
    return [v.ref for v in versions.list(store)]


def test_the_newest_versions_and_labelled_ones_stay_whatever_their_age(store: Store) -> None:
    garbage = gc(store, Policy(keep=1))
    assert [v.ref for v in garbage.versions] == ["m@1", "m@3"]
    assert {*garbage.manifests} == {key(w) for w in ("stat1", "out1", "stat3", "out3")}
    assert garbage.bytes == 220
    assert len(refs(store)) == 4, "nothing is deleted by listing"
    assert delete(store, garbage).bytes == 220
    assert refs(store) == ["m@2", "m@4"]
    assert stored(store) == {key(w) for w in ("source", "stat2", "out2", "stat4", "out4")}
    assert versions.publish(store, "m", key("out2")) == 5, "no number is given twice"
    with pytest.raises(ValueError, match="keep is 0"):
        Policy(keep=0)


def test_one_version_goes_with_what_only_it_needs(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "experiment", x="e")
    with pytest.raises(ValueError, match="production is m@2: promote another version first"):
        gc(store, Policy(only="m@2"))
    garbage = gc(store, Policy(only="m@4"))
    assert {*garbage.manifests} == {key("stat4"), key("out4")} and garbage.bytes == 110
    delete(store, garbage)
    assert refs(store) == ["m@1", "m@2", "m@3"]
    assert key("experiment") in stored(store) and key("source") in stored(store)
    with pytest.raises(NotStored):
        versions.resolve(store, "m@4")
    commit(store, tmp_path, "new", x="n")
    assert versions.publish(store, "m", key("new")) == 5, "m@4 is never something else"


def test_results_stay_and_still_tell_what_they_were_made_from(store: Store, tmp_path: Path) -> None:
    before = [*versions.lineage(store, key("out1"))]
    garbage = gc(store, Policy(results=True))
    assert garbage.versions == () and garbage.bytes == 1400
    delete(store, garbage)
    assert stored(store) == {key(f"out{n}") for n in range(1, 5)}
    assert [*versions.lineage(store, key("out1"))] == before == [key(w) for w in ("out1", "stat1", "source")]
    assert store.artifact(key("out1")).file("x").read_text() == "1" * 10
    assert commit(store, tmp_path, "stat1", inputs=(key("source"),), x="1" * 100).first, "it can be computed again"
    assert gc(store, Policy(results=True)).broken == ()


def test_what_a_run_relies_on_stays_whatever_the_grace(store: Store, tmp_path: Path) -> None:
    commit(store, tmp_path, "begun", inputs=(key("stat1"),), x="b" * 50)
    commit(store, tmp_path, "other", x="o" * 50)
    if store.url.startswith("s3"):
        time.sleep(1.1)  # S3 tells time in seconds
    mark = runs.Mark(store, [key("begun"), key("not-yet"), key("stat3"), key("out3")])
    for policy in (Policy(0), Policy(0, keep=1), Policy(0, results=True), Policy(only="m@3"), Policy(only="m@1")):
        garbage = gc(store, policy)
        assert garbage.runs == 1
        spared = {key(w) for w in ("begun", "stat1", "source", "stat3", "out3")}
        assert not spared & {*garbage.manifests}
        assert garbage.blobs == (), "a run may be about to name what nothing names yet"
    delete(store, gc(store, Policy(0)))
    assert key("other") not in stored(store) and key("begun") in stored(store)
    mark.end()
    assert {*gc(store, Policy(0)).manifests} == {key("begun")}
    assert gc(store, Policy(0)).runs == 0


def test_a_run_that_died_holds_nothing_for_ever(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    commit(store, tmp_path, "begun", x="b")
    mark = runs.Mark(store, [key("begun")])
    (path,) = (Path(store.url) / "runs").iterdir()
    os.utime(path, (time.time() - 2 * runs.LIVE,) * 2)
    garbage = gc(store, Policy(0))
    assert garbage.runs == 0 and garbage.manifests == (key("begun"),)
    delete(store, garbage)
    assert not path.exists()
    mark.end()


def test_a_mark_is_touched_and_comes_back_if_it_was_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "TOUCH", 0.05)
    store = Store.open(str(tmp_path / "store"))
    mark = runs.Mark(store, [key("begun")])
    (path,) = (Path(store.url) / "runs").iterdir()
    for harm in (lambda: os.utime(path, (0, 0)), path.unlink):
        harm()
        end = time.monotonic() + 20
        while not (path.exists() and path.stat().st_mtime > time.time() - 60):
            assert time.monotonic() < end
            time.sleep(0.02)
    assert runs.live(store, store.blobs.now()).keys == {key("begun")}
    mark.end()
    assert not path.exists()


def test_the_clock_is_the_server_s(s3_url: str, server: servers.Proxy, tmp_path: Path) -> None:
    """A machine whose clock is a month ahead must not take what was written just now for old."""
    store = Store.open(s3_url, tmp_path)
    commit(store, tmp_path, "young", x="y")
    assert abs(store.blobs.now() - time.time()) < 60
    past = datetime(2020, 1, 1).timestamp()
    server.fault = lambda method, path: (
        servers.Fault(200, date=formatdate(past, usegmt=True)) if method == "HEAD" and path.count("/") == 1 else None
    )
    assert store.blobs.now() == past
    assert gc(store, Policy(0)).manifests == (), "for the server nothing is as old as that"
