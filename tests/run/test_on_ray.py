"""What only a cluster can do: run steps beside each other, bound them, and lose their workers."""

import io
from contextlib import nullcontext
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorDiedError

from moeflow.run import CannotRun, ClusterLost, Options, StepFailed
from moeflow.run.call import Call
from moeflow.run.ray import runner as on_ray
from moeflow.run.ray.board import Board, Event, RemoteBoard
from moeflow.run.ray.nodes import Nodes, demand, too_large
from moeflow.step import Resources, Step
from moeflow.store import LocalBlobs, S3Blobs, Store
from tests.run import toy


def content(store: Store, step: Step) -> str:
    return store.artifact(step.key).file("n").read_text().strip()


def most_at_once(trace: Path) -> int:
    now = most = 0
    for line in trace.read_text().splitlines():
        now += int(line)
        most = max(most, now)
    return most


@pytest.mark.usefixtures("local_ray")
def test_independent_steps_run_beside_each_other(store: Store, tmp_path: Path) -> None:
    pair = [toy.meet(me=a, other=b, folder=str(tmp_path)) for a, b in (("a", "b"), ("b", "a"))]
    assert len(on_ray.run(pair, store).ran) == 2


@pytest.mark.usefixtures("local_ray")
def test_no_more_steps_are_in_flight_than_stated(store: Store, trace: Path) -> None:
    steps = [toy.span(n=n, trace=str(trace)).on(cpus=0.25) for n in range(12)]
    on_ray.run(steps, store, options=Options(in_flight=2))
    assert most_at_once(trace) <= 2
    trace.write_text("")
    more = [toy.span(n=n, trace=str(trace), beside=3).on(cpus=0.25) for n in range(100, 106)]
    on_ray.run(more, store, options=Options(in_flight=8))
    assert 2 < most_at_once(trace) <= 8, "the bound, and not something else, held the others back"


@pytest.mark.usefixtures("local_ray")
def test_steps_demand_their_cpus(store: Store, trace: Path) -> None:
    steps = [toy.span(n=n, trace=str(trace)).on(cpus=2) for n in range(4)]
    on_ray.run(steps, store)
    assert most_at_once(trace) == 1


@pytest.mark.usefixtures("local_ray")
def test_a_worker_killed_in_the_middle_of_a_step_is_replaced_and_continues(store: Store, trace: Path, tmp_path: Path) -> None:
    graph = toy.count(to=8, die_at=5, marker=str(tmp_path / "died"), trace=str(trace))
    scalars = toy.Scalars(io.StringIO())
    outcome = on_ray.run([graph], store, progress=scalars)
    assert (tmp_path / "died").exists() and scalars.heard[-3:] == [(6, "number", 6), (7, "number", 7), (8, "number", 8)]
    assert trace.read_text().splitlines() == ["from 0", "from 5"]
    assert (content(store, graph), len(outcome.ran)) == ("8", 1)


@pytest.mark.usefixtures("local_ray")
def test_a_worker_lost_more_often_than_retries_allow_fails_the_step(store: Store, tmp_path: Path) -> None:
    graph = toy.count(to=8, die_at=5, marker=str(tmp_path / "died"))
    with pytest.raises(StepFailed, match=r"lost too often .*\.on\(memory=") as failure:
        on_ray.run([graph], store, options=Options(retries=0))
    assert graph.key in str(failure.value) and "\n" not in str(failure.value)
    on_ray.run([graph], store)
    assert content(store, graph) == "8"


@pytest.mark.usefixtures("local_ray")
def test_a_run_whose_board_is_lost_says_so_in_one_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost:
        """A board that is gone as soon as it stands."""

        def options(self, **options: object) -> "Lost":
            return self

        def remote(self, *arguments: object) -> object:
            board = RemoteBoard.remote(*arguments)
            ray.kill(board)
            return board

    monkeypatch.setattr(on_ray, "RemoteBoard", Lost())
    with pytest.raises(ClusterLost, match=r"cluster was lost .*what had finished is stored.*run again") as lost:
        on_ray.run([toy.number(n=77)], store)
    assert isinstance(lost.value.__cause__, ActorDiedError) and "\n" not in str(lost.value)


def test_a_step_prefers_the_node_that_holds_most_of_what_it_reads(tmp_path: Path) -> None:
    large, small = toy.number(n=1), toy.number(n=2)
    readers = [toy.total(large, small), toy.half(small), toy.half(large)]
    both, one, other = (Call.of(s, ["0"] * len(s.inputs)) for s in readers)
    bucket = Store(S3Blobs("bucket", "prefix"), tmp_path)
    nodes = Nodes(bucket, {large.key: 1000, small.key: 10})
    assert nodes.near(both) == "DEFAULT"
    nodes.holds(one, "a" * 56, 5)
    nodes.holds(other, "b" * 56, 5)
    near = nodes.near(both)
    assert not isinstance(near, str) and near.node_id == "b" * 56 and near.soft
    shared = Nodes(Store(LocalBlobs(tmp_path), tmp_path), {large.key: 1000})
    shared.holds(one, "a" * 56, 5)
    assert shared.near(both) == "DEFAULT", "a folder is as near to one node as to another"


def test_the_board_lets_a_step_start_as_often_as_its_retries_allow() -> None:
    board = Board(retries=1)
    assert [board.may_start("one") for _ in range(3)] == ["yes", "yes", "worn out"]
    assert board.may_start("two") == "yes"
    board.close()
    assert board.may_start("three") == "closed"
    assert [e.key for e in board.news()] == ["one", "one", "two"] and board.news() == []


def test_the_board_keeps_the_newest_progress_of_each_step() -> None:
    board = Board(retries=0)
    for n in range(5):
        board.tell(Event("progress", "one", n, 5, "tokens"))
    board.tell(Event("note", "one", text="a remark"))
    assert [(e.kind, e.done) for e in board.news()] == [("note", 0), ("progress", 4)]


def test_a_step_demands_the_memory_that_its_spec_says_unless_told_otherwise() -> None:
    step = toy.number(n=1)
    assert demand(step) == {"CPU": 1, "memory": 1000}
    assert demand(step.on(cpus=2, gpus=1, memory=5000)) == {"CPU": 2, "GPU": 1, "memory": 5000}


@pytest.mark.usefixtures("local_ray")
def test_a_step_that_can_use_a_gpu_runs_on_cpus_where_the_cluster_has_none(store: Store) -> None:
    step = toy.number(n=5).on(gpus=1)
    outcome = on_ray.run([step], store)
    assert outcome.ran == [step.key]
    assert [w for w in outcome.warnings if "no GPU now" in w and "--gpus 1" in w] == [*outcome.warnings] != []
    assert on_ray.run([toy.number(n=6)], store).warnings == ()
    assert demand(step) == {"CPU": 1, "GPU": 1, "memory": 1000} != demand(step, gpus=False)


def test_a_gang_needs_room_for_all_its_processes_at_once() -> None:
    nodes = [{"CPU": 3.0, "memory": 2500.0}, {"CPU": 1.0, "memory": 5000.0}]
    gang = toy.number(n=1)  # 1 CPU and 1,000 bytes each
    assert too_large(gang.on(processes=3), nodes) == ""
    assert too_large(gang.on(processes=4), nodes) == (
        "toy.number is a gang of 4 processes of 1 CPUs, 1000 bytes of memory each, and the nodes have room for 3"
    )
    assert "asks for 4 CPUs" in too_large(gang.on(processes=2, cpus=4), nodes)
    assert demand(gang.on(processes=3)) == demand(gang)


@pytest.mark.usefixtures("local_ray")
def test_a_gang_larger_than_a_ray_of_ones_own_is_refused(store: Store, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "connected", lambda: nullcontext(True))
    with pytest.raises(CannotRun, match="gang of 3 processes .* room for 2; place it with") as refused:
        on_ray.run([toy.half(toy.number(n=8, trace=str(trace))).on(processes=3)], store)
    assert "\n" not in str(refused.value) and trace.read_text() == ""


def test_gpus_and_cpus_are_given_to_the_steps_that_compute_with_a_model_alone() -> None:
    modelled, plain = toy.number(n=5).on(gpus=1), toy.number(n=6)
    target = Options(gpus=0.5, cpus=8).place(toy.total(modelled, plain))
    assert [(s.resources.gpus, s.resources.cpus) for s in target.inputs] == [(0.5, 8), (0, 1)]  # type: ignore[union-attr]
    assert target.resources == plain.resources
    gang = Options(gpus=2, cpus=8).place(modelled.on(gpus=1, processes=4, settings={"zero": 2})).resources
    assert gang == Resources(cpus=8, gpus=2, processes=4, settings={"zero": 2}), "for each process"
    with pytest.raises(ValueError, match=r"cpus=0.5 must be at least 1"):
        Options(cpus=0.5)
