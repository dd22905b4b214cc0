"""A plan says before anything runs what then happens: steps, bytes, and what cannot work."""

from collections.abc import Callable

import pytest

from moeflow.run import Options, Outcome, in_process
from moeflow.run.plan import Plan, plan
from moeflow.run.plan_table import plan_lines, plan_table
from moeflow.step import Context, Spec, Step, step
from moeflow.store import Store
from tests.run import toy


def agree(planned: Plan, outcome: Outcome) -> None:
    assert [(r.key, r.state) for r in planned.rows] == [(s.key, s.state) for s in outcome.steps]
    assert [(r.key, r.reads, r.writes) for r in planned.rows] == [(s.key, s.reads, s.writes) for s in outcome.steps]


def graph(n: int, size: int = 100) -> Step:
    numbers = [toy.number(n=i, size=size + i) for i in range(n)]
    return toy.total(*(toy.half(number, size=size) for number in numbers))


def test_a_plan_of_a_new_graph_says_what_then_happens(run: Callable[..., Outcome], store: Store) -> None:
    target = toy.total(*(toy.number(n=n, size=10 + n) for n in range(5)))
    planned = plan([target], store)
    assert (planned.reads, planned.writes) == (60, 68)
    agree(planned, run([target], store))


def test_a_plan_of_a_grown_graph_says_what_is_stored(run: Callable[..., Outcome], store: Store) -> None:
    run([toy.total(*(toy.number(n=n) for n in range(3)))], store)
    target = toy.total(*(toy.number(n=n) for n in range(5)))
    planned = plan([target], store)
    assert (len(planned.keys("run")), len(planned.keys("stored"))) == (3, 3)
    agree(planned, run([target], store))


def test_a_plan_foresees_what_has_the_same_contents(run: Callable[..., Outcome], store: Store) -> None:
    old, new = toy.half(toy.number(n=6)), toy.half(toy.number(n=7))
    run([toy.total(toy.total(old))], store)
    run([new], store)
    target = toy.total(toy.total(new))
    planned = plan([target], store)
    assert [r.state for r in planned.rows] == ["stored", "stored", "same content", "same content"]
    assert planned.reads == planned.writes == 0
    agree(planned, run([target], store))


def test_a_plan_foresees_same_contents_of_parts(run: Callable[..., Outcome], store: Store) -> None:
    def reading(values: list[int]) -> Step:
        return toy.read(toy.shards(values=values).part("shard-0"))

    run([reading([1, 2])], store)
    run([toy.shards(values=[1, 3])], store)
    planned = plan([reading([1, 3])], store)
    assert [r.state for r in planned.rows] == ["stored", "same content"]
    assert [s.state for s in run([reading([1, 3])], store).steps] == ["stored", "same content"]


def test_a_plan_foresees_that_one_of_two_equal_recipes_runs(run: Callable[..., Outcome], store: Store) -> None:
    one, two = toy.half(toy.number(n=6)), toy.half(toy.number(n=7))
    run([one, two], store)
    targets = [toy.total(one), toy.total(two)]
    planned = plan(targets, store)
    assert (len(planned.keys("run")), len(planned.keys("same content"))) == (1, 1)
    agree(planned, run(targets, store))


def test_a_plan_of_a_finished_graph_is_empty(run: Callable[..., Outcome], store: Store) -> None:
    run([graph(4)], store)
    planned = plan([graph(4)], store)
    assert planned.keys("stored") == [r.key for r in planned.rows]
    assert planned.reads == planned.writes == planned.memory == 0


def test_a_plan_runs_and_stores_nothing(store: Store) -> None:
    plan([graph(4)], store)
    assert not list(store.blobs.list("manifests/")) and not list(store.blobs.list("blobs/"))


def test_a_plan_of_many_steps_asks_for_no_single_one(store: Store) -> None:
    class Counting:
        """Blobs that count what is asked of them."""

        def __init__(self, inner: object) -> None:
            self.inner, self.asked = inner, []  # type: ignore[var-annotated]

        def __getattr__(self, name: str) -> object:
            self.asked.append(name)
            return getattr(self.inner, name)

    counting = Counting(store.blobs)
    target = toy.total(*(toy.half(toy.number(n=n)) for n in range(700)))
    plan([target], Store(counting, store.cache))  # type: ignore[arg-type]
    assert counting.asked.count("list") <= 6, "two listings for each of the three names of steps"
    assert not {"exists", "read", "stat", "create"} & {*counting.asked}


@step("toy.huge", version=1, spec=lambda size: Spec(writes=size, memory=size, notes=("it is huge",)))
def huge(context: Context, *, size: int) -> None:
    (context.out / "n").write_text("1")


def test_a_disk_too_small_is_foreseen(store: Store) -> None:
    (problem,) = plan([huge(size=1 << 60)], store).problems
    assert store.url in problem and "1048576.0 TiB" in problem and "--store" in problem


def test_a_step_larger_than_this_machine_is_foreseen(store: Store) -> None:
    assert plan([huge(size=1 << 20).on(cpus=4, gpus=1)], store, memory=1 << 30).problems == ()
    for target in (huge(size=1 << 31), huge(size=1).on(memory=1 << 31)):
        (problem,) = plan([target], store, memory=1 << 30).problems
        assert "2.0 GiB" in problem and "1.0 GiB" in problem


def test_a_gang_is_planned_with_its_processes_and_what_each_needs(store: Store) -> None:
    gang = huge(size=1000).on(processes=8, device=41 << 30)
    planned = plan([gang, toy.number(n=1)], store)
    assert "toy.huge: 8 processes, 41.0 GiB on each device" in plan_lines(planned)
    assert plan_lines(plan([huge(size=1000).on(processes=1)], store))[1] == "toy.huge: 1 process"
    row, other = planned.json()["rows"]
    assert (row["processes"], row["device"]) == (8, 41 << 30) and (other["processes"], other["device"]) == (0, 0)


def test_a_gang_that_this_machine_could_not_hold_is_foreseen(store: Store) -> None:
    gang = huge(size=1 << 30).on(processes=4)
    assert plan([gang], store, memory=4 << 30).problems == ()
    (problem,) = plan([gang], store, memory=(4 << 30) - 1).problems
    assert "4.0 GiB for its 4 processes" in problem


def test_what_is_stored_needs_no_room(store: Store) -> None:
    target = huge(size=1 << 60)
    in_process.run([target], store)
    assert plan([target], store, memory=1).problems == ()


def test_a_plan_reads_well(store: Store) -> None:
    planned = plan([graph(3), huge(size=2048)], store)
    lines = plan_lines(planned)
    assert lines[0] == "8 steps: 8 to run, 0 stored; reads 603 bytes, writes 2.6 KiB, at most 2.0 KiB of memory in one step"
    assert lines[1] == "toy.huge: it is huge"
    table = plan_table(planned)
    assert (table.row_count, plan_table(planned, every=True).row_count) == (4, 8)


def test_a_plan_as_json_holds_every_step(store: Store) -> None:
    described = plan([graph(3)], store).json()
    assert described["steps"] == {"run": 7, "stored": 0, "same content": 0, "not needed": 0}
    assert len(described["rows"]) == 7 and described["rows"][0]["key"].startswith("toy.number-")


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="in_flight=-1"):
        Options(in_flight=-1)
