"""A step of several processes: one key and the same bytes however many there are, and what it survives."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread

import psutil
import pytest

from moeflow.run import Options, StepFailed, children, in_process
from moeflow.run.gang import PeerLost, torn
from moeflow.run.progress import Lines
from moeflow.run.ray.gang import Raised, judge
from moeflow.run.ray.travel import packed_error
from moeflow.step import Step
from moeflow.store import Store, partial
from moeflow.store.partial import Snapshot
from tests.run import gangs, toy
from tests.run.cluster import PATIENCE, ROOT, descendants, title, two_nodes, until


def read(store: Store, step: Step) -> dict[str, str]:
    artifact = store.artifact(step.key)
    return {name: artifact.file(name).read_text().strip() for name in artifact.names()}


def lines(trace: Path) -> list[str]:
    return sorted(trace.read_text().splitlines())


def one_and_two(store: Store, other: Store) -> Step:
    """The sum of squares, stored by one process."""
    target = gangs.sum_(toy.number(n=3), to=4)
    in_process.run([target.on(processes=1)], store)
    in_process.run([target.on(processes=2, settings={"stage": 3})], other)
    return target


@pytest.mark.slow
def test_one_process_and_two_leave_the_same_bytes_under_the_same_key(store: Store, tmp_path: Path) -> None:
    other = Store.open(str(tmp_path / "other"))
    target = one_and_two(store, other)
    assert read(store, target) == {"sum": str(3 * (1 + 4 + 9 + 16)), "n": "3"}, "and nothing of what rank 1 left"
    assert store.manifest(target.key).digest == other.manifest(target.key).digest
    assert not [*other.blobs.list("partial/")]
    assert [p.name for p in (other.cache / "work").iterdir()] == [".lock"]


def test_a_killed_process_is_replaced_and_the_gang_goes_on_from_what_it_kept(store: Store, trace: Path, tmp_path: Path) -> None:
    shown = (tmp_path / "told").open("w+")
    target = gangs.sum_(toy.number(n=1), to=5, die_at=3, marker=str(tmp_path / "died"), trace=str(trace)).on(processes=2)
    scalars = toy.Scalars(shown, quiet=0)
    outcome = in_process.run([target], store, progress=scalars)
    assert read(store, target)["sum"] == "55" and outcome.steps[-1].notes == ("summed up to 5",)
    begun = [int(line.rpartition(" ")[2]) for line in lines(trace)]
    assert begun[0] == begun[2] == 0 and begun[1] == begun[3] >= 2, "both went on from the same step"
    said = (tmp_path / "told").read_text()
    assert "process 1 was killed by SIGKILL; it goes on from what was saved" in said
    assert "5/5 squares  sum 55  " in said
    assert said.count("summed up to 5") == 1, "rank 0 speaks for all"
    assert {*scalars.heard} == {(1, "sum", 1), (2, "sum", 5), (3, "sum", 14), (4, "sum", 30), (5, "sum", 55)}
    assert len(scalars.heard) <= 6, "once each, and again at most the one behind what was saved"


def test_a_process_lost_more_often_than_retries_allow_fails_the_step(store: Store) -> None:
    with pytest.raises(StepFailed, match=r"lost too often \(process 0 ended with code 3: a library aborts\)") as failed:
        in_process.run([gangs.vanish().on(processes=1)], store, options=Options(retries=0))
    assert "\n" not in str(failed.value)


@pytest.mark.slow
def test_what_one_process_raises_is_the_error_and_not_that_others_lost_it(
    store: Store, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "GRACE", PATIENCE)
    with pytest.raises(StepFailed, match="gang.raise failed: ArithmeticError: a bad expert on rank 1 ") as failed:
        in_process.run([gangs.raise_(rank=1, trace=str(trace)).on(processes=2)], store)
    assert isinstance(failed.value.cause, ArithmeticError) and "\n" not in str(failed.value)
    assert any("in raise_" in note for note in failed.value.cause.__notes__), "its traceback came with it"
    assert lines(trace) == ["0", "1"], "nothing was tried again"
    assert not [p for p in descendants() if "moeflow.run.child" in title(p)]


def test_a_process_that_leaves_does_not_take_the_run_with_it(store: Store) -> None:
    with pytest.raises(StepFailed, match="gang.leave failed: RuntimeError: the step ended its process: SystemExit enough"):
        in_process.run([gangs.leave().on(processes=1)], store)


@pytest.mark.slow
def test_every_process_of_a_machine_goes_on_from_one_folder_with_the_files_of_all(
    store: Store, trace: Path, tmp_path: Path
) -> None:
    target = gangs.keep(to=5, trace=str(trace)).on(processes=2, cpus=3, settings={"stage": 3})
    keep_parts(store, target, tmp_path, at=4)
    in_process.run([target], store)
    first, second = lines(trace)
    for rank, line in enumerate((first, second)):
        assert line.startswith(f"{rank} of 2 from 4 with {{'stage': 3}} and 3 threads in /")
    assert first.rpartition(" ")[2] == second.rpartition(" ")[2]


def test_what_another_number_of_processes_kept_is_not_resumed_and_that_is_said(store: Store, trace: Path, tmp_path: Path) -> None:
    target = gangs.keep(to=5, trace=str(trace)).on(processes=1)
    keep_parts(store, target, tmp_path, at=4)
    outcome = in_process.run([target], store)
    assert lines(trace)[0].startswith("0 of 1 from 0")
    assert outcome.steps[0].notes == ("an interrupted run of 2 processes cannot be continued by 1 process: it starts again",)


def keep_parts(store: Store, step: Step, folder: Path, *, at: int) -> None:
    """What two processes would leave of `gang.keep` at a step."""
    for rank in range(2):
        state = folder / f"state-{rank}"
        state.mkdir()
        (state / f"rank-{rank}").write_text(str(at))
        partial.save_part(store, step.key, state, Snapshot(at, "a", 2), rank)


def test_a_state_must_have_a_number_that_grows(store: Store) -> None:
    with pytest.raises(StepFailed, match=r"save\(at=2\) after at=2; pass a number that grows"):
        in_process.run([gangs.save_again().on(processes=1)], store)


@pytest.mark.slow
def test_a_killed_and_an_interrupted_driver_leave_no_process_and_the_next_run_continues(tmp_path: Path) -> None:
    release, trace, store = tmp_path / "release", tmp_path / "trace", Store.open(str(tmp_path / "store"))
    target = gangs.keep(to=4, hold=2, until=str(release), trace=str(trace)).on(processes=2)
    pipeline = [str(Path(gangs.__file__).with_name("gang_pipeline.py")), "--store", store.url, "--runner", "process"]
    command = [sys.executable, *pipeline, "-p", f"until={release}", "-p", f"trace={trace}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for stop, runs in ((signal.SIGKILL, 1), (signal.SIGINT, 2)):
        driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until(lambda: trace.exists() and len(lines(trace)) == 2 * runs, "the gang did not start")  # noqa: B023
        until(lambda: [s for s in partial.snapshots(store, target.key) if s.at >= 1], "nothing was kept")
        processes = psutil.Process(driver.pid).children()
        assert len(processes) == 2
        driver.send_signal(stop)
        _, errors = driver.communicate(timeout=PATIENCE)
        until(lambda: not any(p.is_running() and p.status() != "zombie" for p in processes), "processes were left")  # noqa: B023
    assert driver.returncode == 1 and errors.splitlines()[-1].startswith("error: interrupted")
    release.touch()
    in_process.run([target], store)
    begun = [int(line.split()[4]) for line in lines(trace)]
    assert begun[:3] == begun[3:] and begun[0] == 0 and 1 <= begun[1] <= begun[2] <= 3
    assert not [*store.blobs.list("partial/")]


def test_an_error_that_a_lost_peer_may_have_caused_is_told_from_others() -> None:
    class DistBackendError(RuntimeError):
        __module__ = "torch.distributed"

    closed = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
    wrapped = ValueError("training stopped")
    wrapped.__cause__ = closed
    assert all(torn(error) for error in (closed, wrapped, DistBackendError("NCCL error")))
    assert not any(torn(error) for error in (ValueError("Connection closed by peer"), RuntimeError("loss is nan"), KeyError("x")))


def test_on_a_cluster_a_lost_process_outweighs_an_error_and_an_error_outweighs_a_broken_connection() -> None:
    def raised(error: Exception, *, by_peer: bool) -> Raised:
        sent = Raised(str(error), packed_error(error), by_peer)
        return pickle.loads(pickle.dumps(sent))

    bad, closed, died = raised(KeyError("bad"), by_peer=False), raised(RuntimeError("closed"), by_peer=True), OSError("died\nlong")
    with pytest.raises(KeyError, match="bad"):
        judge({0: closed, 1: bad})
    with pytest.raises(PeerLost, match="^process 1 was lost, OSError: died$"):
        judge({0: bad, 1: died})
    with pytest.raises(PeerLost, match="^closed$"):
        judge({0: closed})


def trainers() -> list[str]:
    return [title(p) for p in descendants() if title(p).startswith(("ray::RayTrainWorker", "ray::TrainController", "ray::gang"))]


@pytest.mark.slow
def test_on_two_nodes_a_gang_survives_a_lost_driver_and_a_lost_node(store: Store, trace: Path, tmp_path: Path) -> None:
    """One process on each; the bytes are those of one process on this machine."""
    from moeflow.run.ray import runner as on_ray

    go, log = tmp_path / "go", (tmp_path / "told").open("w+")
    params = {"to": 6, "hold": 3, "until": str(go), "trace": str(trace)}
    target = gangs.sum_(toy.number(n=3), **params).on(processes=2)
    code = (
        "from moeflow.run.ray import runner as on_ray; from moeflow.store import Store; from tests.run import gangs, toy\n"
        f"on_ray.run([gangs.sum_(toy.number(n=3), **{params}).on(processes=2)], Store.open({store.url!r}))"
    )
    with two_nodes() as nodes:
        driver = nodes.drive([sys.executable, "-c", code])
        until(lambda: [s for s in partial.snapshots(store, target.key) if s.at >= 2], "nothing was kept")
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        until(lambda: not trainers(), "a trainer outlived its driver")
        assert not store.has(target.key)
        again = Thread(target=lambda: on_ray.run([target], store, progress=Lines(log)))
        again.start()
        until(lambda: len(lines(trace)) == 4, "the gang did not start again")
        nodes.lose()
        nodes.replace()
        go.touch()
        again.join()
        until(lambda: not trainers(), "a trainer outlived its run")
    begun = [int(line.rpartition(" ")[2]) for line in lines(trace)]
    assert begun[:3] == begun[3:] and begun[0] == 0 and 2 <= begun[1] <= begun[2] <= 4
    assert "was lost, " in (tmp_path / "told").read_text()
    undisturbed = Store.open(str(tmp_path / "undisturbed"))
    in_process.run([target.on(processes=1)], undisturbed)
    assert undisturbed.manifest(target.key).digest == store.manifest(target.key).digest
