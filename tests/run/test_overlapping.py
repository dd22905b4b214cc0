"""Two runs of one graph at once: what one computes the other waits for, and whoever dies holds nobody up."""

import os
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest

from moeflow.run import Options, StepFailed, in_process
from moeflow.run.go import Runner, go, prepare
from moeflow.run.progress import Lines, Show
from moeflow.run.ray import runner as on_ray
from moeflow.step import Step
from moeflow.store import Store, StoreError, claims, runs, versions
from moeflow.store.claims import Busy, claimed
from tests.run import toy
from tests.run.cluster import PATIENCE, ROOT, until


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "LOOK", 0.2)
    monkeypatch.setattr(in_process, "LOOK", 0.2)


def graph(tmp_path: Path) -> Step:
    trace = str(tmp_path / "trace")
    slow = [toy.slow(n=n, until=str(tmp_path / "release"), trace=trace) for n in range(3)]
    return toy.total(*(toy.half(s, trace=trace) for s in slow), trace=trace)


def both(store: Store, target: Step, options: Options, lines: Path, release: Path, shown: list[Show]) -> list[int]:
    """Run the graph twice at once, the second when the first computes; the number of steps that each computed."""
    ran: list[int] = []

    def run(show: Show) -> None:
        prepared = prepare(target, store, name="toy", runner=Runner.process)
        ran.append(len(go(prepared, progress=show, options=options, record={})[0].ran))

    threads = [Thread(target=run, args=(show,)) for show in shown]
    threads[0].start()
    until(lambda: lines.exists() and lines.read_text(), "the first run computed nothing")
    threads[1].start()
    until(lambda: len([*store.blobs.list("runs/")]) == 2, "the second run did not begin")
    release.touch()
    for thread in threads:
        thread.join(PATIENCE)
    return ran


def test_two_runs_at_once_compute_every_step_once(tmp_path: Path) -> None:
    store, trace = Store.open(str(tmp_path / "store")), tmp_path / "trace"
    target = graph(tmp_path)
    ran = both(store, target, Options(), trace, tmp_path / "release", [Show(), Show()])
    assert sum(ran) == 7 and len(trace.read_text().splitlines()) == 10, trace.read_text()
    assert [v.ref for v in versions.list(store)] == ["toy@1"]
    assert [*store.blobs.list("claims/")] == [*store.blobs.list("runs/")] == []


def test_a_claim_holds_while_its_run_lives_and_no_longer(tmp_path: Path) -> None:
    store, key = Store.open(str(tmp_path / "store")), toy.number(n=1).key
    mine, other = runs.Mark(store, []), runs.Mark(store, [])
    with claimed(store, key, other.name):
        with pytest.raises(Busy, match="toy.number is being computed by another run"), claimed(store, key, mine.name):
            pass
        with claimed(store, key, ""):  # a run without a mark asks nobody
            pass
        path = Path(store.url) / other.name
        os.utime(path, (path.stat().st_mtime - 2 * claims.FRESH,) * 2)
        with claimed(store, key, mine.name):  # its run gave no sign of life for too long
            pass
    with claimed(store, key, mine.name), claimed(store, key, mine.name):  # a worker of this run was lost
        pass
    other.end()
    store.blobs.create(f"claims/{key}", other.name.encode())
    with claimed(store, key, mine.name):
        pass
    mine.end()


def test_who_could_not_ask_for_a_claim_gives_none_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, key = Store.open(str(tmp_path / "store")), toy.number(n=1).key
    other, mine = runs.Mark(store, [key]), runs.Mark(store, [key])
    with claimed(store, key, other.name):
        with monkeypatch.context() as down:
            down.setattr(type(store.blobs), "stat", lambda *_: (_ for _ in ()).throw(StoreError("it does not answer")))
            held = claimed(store, key, mine.name)
            held.__enter__()
        held.__exit__(None, None, None)
        assert (Path(store.url) / "claims" / key).read_text() == other.name
    other.end()
    mine.end()


def test_the_claims_of_a_run_that_was_killed_here_hold_nobody_up(tmp_path: Path) -> None:
    """Its mark is as young as can be, but names a process that is over; so does garbage collection count it as dead."""
    store, key = Store.open(str(tmp_path / "store")), toy.number(n=1).key
    script = (
        "import os, sys; from moeflow.store import Store, claims, runs; store = Store.open(sys.argv[1])\n"
        "mark = runs.Mark(store, [sys.argv[2]])\n"
        "held = claims.claimed(store, sys.argv[2], mark.name); held.__enter__(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, store.url, key]).returncode == 9
    assert len([*store.blobs.list("claims/")]) == len([*store.blobs.list("runs/")]) == 1
    assert not runs.live(store, store.blobs.now()).keys
    mine = runs.Mark(store, [])
    assert runs.live(store, store.blobs.now()).runs == 1
    with claimed(store, key, mine.name):
        assert (Path(store.url) / "claims" / key).read_text() == mine.name
    mine.end()


def test_a_store_that_keeps_no_claims_is_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without claims both compute, and the first commit stands."""
    store = Store.open(str(tmp_path / "store"))
    (Path(store.url) / "claims").parent.mkdir(parents=True)
    (Path(store.url) / "claims").write_text("a file where the folder should be")
    step = toy.number(n=1)
    outcome = in_process.run([step], store, options=Options(run="runs/x.json"))
    assert outcome.ran == [step.key]


def test_a_step_that_fails_in_one_run_is_tried_by_the_other(tmp_path: Path) -> None:
    store, target = Store.open(str(tmp_path / "store")), toy.fail(toy.number(n=1))
    for name in ("runs/a.json", "runs/b.json"):
        with pytest.raises(StepFailed, match="no such expert"):
            in_process.run([target], store, options=Options(run=name))
    assert [*store.blobs.list("claims/")] == []


def test_the_same_contents_under_other_keys_are_no_new_version(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))

    def published(n: int, numbers: int) -> int:
        target = toy.half(toy.number(n=n)).reporting(toy.total(toy.number(n=numbers)))
        return go(prepare(target, store, name="toy", runner=Runner.process), progress=Show(), options=Options(), record={})[1]

    assert published(6, 1) == 1
    assert published(7, 1) == 1, "seven halved and rounded down is three, too"
    assert published(8, 1) == 2
    assert published(8, 2) == 3, "another report"


def test_a_run_that_waits_says_for_what(tmp_path: Path) -> None:
    import io

    stream = io.StringIO()
    target = graph(tmp_path)
    both(Store.open(str(tmp_path / "store")), target, Options(), tmp_path / "trace", tmp_path / "release", [Show(), Lines(stream)])
    assert stream.getvalue().count("toy.slow is being computed by another run, and is waited for") == 1


@pytest.mark.slow
def test_a_run_on_ray_and_one_in_process_share_the_work(local_ray: None, tmp_path: Path) -> None:
    store, trace, target = Store.open(str(tmp_path / "store")), tmp_path / "trace", graph(tmp_path)
    code = f"""
import sys
from tests.run.test_overlapping import graph, Path, Store, Runner, prepare, go, Options, Show
target = graph(Path({str(tmp_path)!r}))
go(prepare(target, Store.open({store.url!r}), name="toy", runner=Runner.process), progress=Show(), options=Options(), record={{}})
"""
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    until(lambda: trace.exists() and trace.read_text(), "the other run computed nothing")
    mark = runs.Mark(store, [])
    done: list[int] = []
    mine = Thread(target=lambda: done.append(len(on_ray.run([target], store, options=Options(run=mark.name)).ran)))
    mine.start()
    until(lambda: len(trace.read_text().splitlines()) >= 3, "they did not share the slow steps")
    (tmp_path / "release").touch()
    mine.join(PATIENCE)
    assert other.wait(PATIENCE) == 0
    mark.end()
    assert done and len(trace.read_text().splitlines()) == 10, trace.read_text()
