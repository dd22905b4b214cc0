"""What one running step may do, and what it leaves behind."""

import fcntl
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from moeflow.run import StepFailed, in_process
from moeflow.run.call import Call
from moeflow.run.work import shared_folder, work_folder
from moeflow.step import Context, Step, step
from moeflow.store import Store, StoreError, partial
from tests.run import toy


@step("toy.twice", version=1)
def twice(context: Context, part: Any) -> None:
    (context.out / "n").write_text("mine")
    context.link(part, "n")


@step("toy.lost", version=1)
def lost(context: Context, part: Any, *, name: str, to: str) -> None:
    context.link(part, name, to)
    context.link(part, "n", to)


@step("toy.spoil", version=1)
def spoil(context: Context, *, values: list[int]) -> None:
    values.append(1)
    (context.out / "n").write_text(str(len(values)))


@step("toy.full", version=1)
def full(context: Context) -> None:
    raise OSError(28, "No space left on device")


@step("toy.resumes", version=1)
def resumes(context: Context) -> None:
    first, second = context.resume(), context.resume()
    (context.out / "n").write_text(f"{first} {second} {(first / 'n').read_text() if first else ''}")


def test_a_file_both_written_and_linked_is_refused(store: Store) -> None:
    with pytest.raises(StepFailed, match="both written and linked"):
        in_process.run([twice(toy.number(n=1))], store)


def test_linking_what_is_not_there_names_what_is(store: Store) -> None:
    with pytest.raises(StepFailed, match="no file 'm' to link; it has: n"):
        in_process.run([lost(toy.number(n=1), name="m", to="x")], store)


@step("toy.elsewhere", version=1)
def elsewhere(context: Context, part: Any, *, url: str, key: str) -> None:
    context.link(Store.open(url).artifact(key), "n")


@step("toy.full_in_other_words", version=1)
def full_in_other_words(context: Context) -> None:
    raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_linking_what_is_no_input_is_refused(store: Store) -> None:
    other = toy.number(n=2)
    in_process.run([other], store)
    with pytest.raises(StepFailed, match="is no input of"):
        in_process.run([elsewhere(toy.number(n=1), url=store.url, key=other.key)], store)


def test_partial_state_that_is_not_whole_is_not_resumed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "n").write_text("7")
    partial.save(store, resumes().key, tmp_path / "state")
    files = [e.name for e in store.blobs.list(f"partial/{resumes().key}/files/")]
    store.blobs.delete(files)
    in_process.run([resumes()], store)
    assert store.artifact(resumes().key).file("n").read_text() == "None None "


def test_linking_two_files_under_one_name_is_refused(store: Store) -> None:
    with pytest.raises(StepFailed, match="already links a file as 'x'"):
        in_process.run([lost(toy.number(n=1), name="n", to="x")], store)


def test_a_step_cannot_spoil_its_parameters(store: Store) -> None:
    graph = spoil(values=[1, 2])
    in_process.run([graph], store)
    assert graph.params == {"values": [1, 2]}
    assert store.manifest(graph.key).params == {"values": [1, 2]}


def test_a_full_disk_is_named(store: Store) -> None:
    with pytest.raises(
        StepFailed, match="no space left on .*; free some, or point MOEFLOW_CACHE / --store to another disk"
    ) as failed:
        in_process.run([full()], store)
    assert isinstance(failed.value.cause, StoreError)
    with pytest.raises(StepFailed, match="no space left on .*; free some"):
        in_process.run([full_in_other_words()], store)


def test_a_file_larger_than_is_allowed_is_named(store: Store) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StepFailed, match="a file under .* became larger than is allowed; .*, or point MOEFLOW_CACHE") as failed:
            in_process.run([toy.number(n=1, size=200_000)], store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(failed.value.cause, StoreError) and not store.has(toy.number(n=1, size=200_000).key)


def test_resuming_twice_gives_the_same_state(store: Store, tmp_path: Path) -> None:
    graph = resumes()
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "n").write_text("7")
    partial.save(store, graph.key, tmp_path / "state")
    in_process.run([graph], store)
    first, second, state = store.artifact(graph.key).file("n").read_text().split()
    assert first == second and state == "7"


def test_a_step_without_partial_state_begins_anew(store: Store) -> None:
    in_process.run([resumes()], store)
    assert store.artifact(resumes().key).file("n").read_text() == "None None "


def test_nothing_is_left_in_the_work_folder(store: Store) -> None:
    in_process.run([toy.total(toy.number(n=1))], store)
    with pytest.raises(StepFailed):
        in_process.run([toy.fail()], store)
    assert [p.name for p in (store.cache / "work").iterdir()] == [".lock"]


def test_folders_of_killed_processes_are_swept_and_others_are_not(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from moeflow.run.work import work_folder\n"
        "with work_folder(Path(sys.argv[1])) as f: (f / 'big').write_text('x'); os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, check=False)
    (left,) = tmp_path.glob("step-*")
    with work_folder(tmp_path) as mine:
        assert not left.exists()
        with work_folder(tmp_path) as other:
            assert mine.exists() and other.exists() and mine != other
    assert not list(tmp_path.glob("step-*"))


def test_a_shared_folder_goes_with_the_last_who_is_in_it(tmp_path: Path) -> None:
    with shared_folder(tmp_path, "gang") as first:
        with shared_folder(tmp_path, "gang") as second, work_folder(tmp_path):
            assert first == second
            (first / "sub").mkdir()
        assert (first / "sub").exists(), "somebody is in it still"
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_a_call_carries_no_graph() -> None:
    def call(depth: int) -> Call:
        end: Step = toy.number(n=1)
        for _ in range(depth):
            end = toy.total(end)
        last = toy.total(end)
        return Call.of(last, ["0" * 32])

    assert len(cloudpickle.dumps(call(300))) == len(cloudpickle.dumps(call(1)))


def test_a_function_of_moeflows_own_travels_by_name() -> None:
    from moeflow.sources import steps

    own = next(v for v in vars(steps).values() if getattr(v, "__wrapped__", None) and v.__module__ == steps.__name__)
    made = Call.of(Step("toy.own", 1, own.__wrapped__), [])
    assert made.code == f"moeflow.sources.steps:{own.__name__}"
    assert pickle.loads(pickle.dumps(made)).function is own.__wrapped__


def test_the_lock_of_a_work_folder_is_held_while_it_is_used(tmp_path: Path) -> None:
    with work_folder(tmp_path) as folder, (folder / ".lock").open("rb+") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_folder_that_its_owner_deletes_during_a_sweep_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, flock = tmp_path / "step-other", fcntl.flock
    other.mkdir()
    (other / ".lock").touch()

    def once_gone(file: Any, how: int) -> None:
        if how == fcntl.LOCK_EX | fcntl.LOCK_NB:
            shutil.rmtree(other)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", once_gone)
    with work_folder(tmp_path) as folder:
        assert folder.is_dir() and not other.exists()
