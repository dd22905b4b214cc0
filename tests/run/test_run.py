"""What both runners promise of any graph."""

import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moeflow.run import Options, StepFailed, in_process
from moeflow.run.plan import plan
from moeflow.run.progress import Lines
from moeflow.step import Step, upstream
from moeflow.store import Store
from moeflow.store.gc import gc
from tests.run import toy


def lines(trace: Path) -> list[str]:
    return trace.read_text().splitlines()


def content(store: Store, step: Step, name: str = "n") -> str:
    return store.artifact(step.key).file(name).read_text().strip()


seldom_on_ray = pytest.mark.parametrize("run", ["process", pytest.param("ray", marks=pytest.mark.slow)], indirect=True)
"""For what both runners have from the code that they share: on Ray it is tested by `make test-all`."""


def test_a_second_run_computes_nothing(run: Callable, store: Store, trace: Path) -> None:
    graph = toy.total(*(toy.number(n=n, trace=str(trace)) for n in (1, 2, 3)), trace=str(trace))
    first = run([graph], store)
    assert content(store, graph) == "6"
    assert sorted(lines(trace)) == ["number 1", "number 2", "number 3", "total of 3"]
    second = run([graph], store)
    assert (len(first.ran), first.stored) == (4, 0)
    assert (len(second.ran), second.stored) == (0, 4)
    assert len(lines(trace)) == 4


def test_only_what_changed_runs_again(run: Callable, store: Store, trace: Path) -> None:
    def graph(n: int) -> Step:
        return toy.total(toy.number(n=1, trace=str(trace)), toy.number(n=n, trace=str(trace)), trace=str(trace))

    run([graph(2)], store)
    trace.write_text("")
    outcome = run([graph(5)], store)
    assert sorted(lines(trace)) == ["number 5", "total of 2"]
    assert (len(outcome.ran), outcome.stored) == (2, 1)


@seldom_on_ray
def test_a_shared_input_runs_once(run: Callable, store: Store, trace: Path) -> None:
    one = toy.number(n=1, trace=str(trace))
    graph = toy.total(one, one, toy.number(n=1, trace=str(trace)), trace=str(trace))
    run([graph], store)
    assert lines(trace) == ["number 1", "total of 3"]
    assert content(store, graph) == "3"


@seldom_on_ray
def test_several_targets_run_and_share_what_they_need(run: Callable, store: Store, trace: Path) -> None:
    base = toy.number(n=8, trace=str(trace))
    one, two = toy.total(base, base), toy.half(base)
    run([one, two], store)
    assert (content(store, one), content(store, two)) == ("16", "4")
    assert lines(trace) == ["number 8"]


@seldom_on_ray
def test_what_is_stored_hides_inputs_that_are_gone(run: Callable, store: Store, trace: Path) -> None:
    base = toy.number(n=8, trace=str(trace))
    graph = toy.half(base)
    run([graph], store)
    store.blobs.delete([f"manifests/{base.key}.json"])
    outcome = run([graph], store)
    assert (len(outcome.ran), outcome.stored, outcome.keys("not needed")) == (0, 1, [base.key])


def test_the_same_contents_are_not_computed_from_again(run: Callable, store: Store, trace: Path) -> None:
    def graph(n: int) -> Step:
        return toy.total(toy.half(toy.number(n=n, trace=str(trace))), trace=str(trace))

    run([graph(6)], store)
    trace.write_text("")
    outcome = run([graph(7)], store)  # 7 halves to 3 as 6 does, so the total has nothing new to read
    assert lines(trace) == ["number 7"]
    assert (len(outcome.ran), outcome.aliased) == (2, 1)
    manifest = store.manifest(graph(7).key)
    assert manifest.same_as == graph(6).key
    assert manifest.digest == store.manifest(graph(6).key).digest
    assert run([graph(7)], store).stored == 3


@seldom_on_ray
def test_a_chain_behind_equal_contents_is_taken_over_whole(run: Callable, store: Store) -> None:
    def graph(n: int) -> Step:
        end = toy.half(toy.number(n=n))
        for _ in range(30):
            end = toy.total(end)
        return end

    run([graph(6)], store)
    outcome = run([graph(7)], store)
    assert (len(outcome.ran), outcome.aliased) == (2, 30)
    assert content(store, graph(7)) == "3"


@seldom_on_ray
def test_two_recipes_with_the_same_contents_in_one_run_are_computed_once(run: Callable, store: Store, trace: Path) -> None:
    one, two = toy.half(toy.number(n=6)), toy.half(toy.number(n=7))
    targets = [toy.total(one, trace=str(trace)), toy.total(two, trace=str(trace))]
    run([one, two], store)
    outcome = run(targets, store)
    assert lines(trace) == ["total of 1"]
    assert (len(outcome.ran), outcome.aliased) == (1, 1)
    assert content(store, targets[0]) == content(store, targets[1]) == "3"


@seldom_on_ray
def test_a_step_that_reads_a_part_ignores_changes_elsewhere(run: Callable, store: Store, trace: Path) -> None:
    def graph(values: list[int]) -> Step:
        shards = toy.shards(values=values)
        return toy.read(shards.part("shard-0"), trace=str(trace))

    run([graph([1, 2])], store)
    outcome = run([graph([1, 3])], store)
    assert lines(trace) == ["read shard-0/n"]
    assert (len(outcome.ran), outcome.aliased) == (1, 1)
    assert run([graph([2, 3])], store).aliased == 0
    assert content(store, graph([2, 3])) == "2"


def test_a_failed_step_is_named_with_its_key_and_parameters(run: Callable, store: Store) -> None:
    graph = toy.fail(toy.number(n=1), message="layer 3 holds NaN")
    with pytest.raises(StepFailed) as failure:
        run([graph], store)
    assert graph.key in str(failure.value)
    assert '"message": "layer 3 holds NaN"' in str(failure.value)
    assert "ArithmeticError: layer 3 holds NaN" in str(failure.value)
    assert "\n" not in str(failure.value)
    assert failure.value.step.key == graph.key
    assert isinstance(failure.value.cause, ArithmeticError)
    assert not store.has(graph.key)
    assert store.has(graph.inputs[0].key)


def test_an_error_that_cannot_be_pickled_is_told_all_the_same(run: Callable, store: Store) -> None:
    with pytest.raises(StepFailed, match="Unpicklable: this and that"):
        run([toy.odd()], store)


def test_nothing_starts_after_a_failure(run: Callable, store: Store, trace: Path, tmp_path: Path) -> None:
    sent = str(tmp_path / "sent")
    later = [toy.slow(n=n, until=sent, trace=str(trace)) for n in range(12)]
    with pytest.raises(StepFailed, match="no such expert"):
        run([toy.fail_and_send(sent=sent, trace=str(trace)), *later], store, options=Options(in_flight=20))
    begun = [line.partition(" ")[0] for line in lines(trace)]
    assert "fail" in begun
    after = begun[begun.index("fail") :]
    assert after.count("begin") <= 1, "at most the step that was starting on the other CPU at that moment"
    stored = [s for s in later if store.has(s.key)]
    assert len(stored) == begun.count("begin") == begun.count("end"), "what was running finished and is stored"


def test_the_run_after_a_failure_continues(run: Callable, store: Store, trace: Path, tmp_path: Path) -> None:
    base = toy.number(n=1, trace=str(trace))
    graph = toy.flaky(to=10, marker=str(tmp_path / "marker"), trace=str(trace))
    target = toy.total(base, graph)
    with pytest.raises(StepFailed, match="the hub went away"):
        run([target], store)
    run([target], store)
    assert content(store, target) == "11"
    assert lines(trace).count("number 1") == 1
    assert [line for line in lines(trace) if line.startswith("from")] == ["from 0", "from 5"], "it took up what it had saved"


@seldom_on_ray
def test_partial_state_goes_when_the_step_is_stored(run: Callable, store: Store) -> None:
    run([toy.count(to=5)], store)
    assert not list(store.blobs.list("partial/"))


@seldom_on_ray
def test_linked_files_move_no_bytes(run: Callable, store: Store) -> None:
    parts = [toy.number(n=n, size=1000 + n) for n in (1, 2)]
    graph = toy.assemble(*parts)
    run(parts, store)
    before = {e.name for e in store.blobs.list("blobs/")}
    outcome = run([graph], store)
    added = {e.name for e in store.blobs.list("blobs/")} - before
    assert len(added) == 1, "only the index that the step wrote itself"
    (ran,) = (s for s in outcome.steps if s.state == "run")
    assert (ran.reads, ran.writes) == (0, 1)
    assert store.artifact(graph.key).names() == ["0.n", "1.n", "index"]
    assert content(store, graph, "1.n") == "2"


@seldom_on_ray
def test_reads_are_counted_by_range(run: Callable, store: Store) -> None:
    graph = toy.slice_(toy.number(n=7, size=1000), start=100, stop=130)
    outcome = run([graph], store)
    assert [s.reads for s in outcome.steps] == [0, 30]
    assert store.manifest(graph.key).reads == 30


@seldom_on_ray
def test_the_record_says_how_a_result_came_to_be(run: Callable, store: Store) -> None:
    graph = toy.total(toy.number(n=1))
    run([graph], store)
    manifest = store.manifest(graph.key)
    assert (manifest.step, manifest.version, manifest.params["size"]) == ("toy.total", 1, 8)
    assert [i.key for i in manifest.inputs] == [graph.inputs[0].key]
    assert manifest.inputs[0].digest == store.manifest(graph.inputs[0].key).digest
    assert manifest.content == graph.content([manifest.inputs[0].digest])
    assert manifest.source == graph.source
    assert {"python", "numpy", "ray"} <= manifest.libraries.keys()


def test_a_step_computes_with_as_many_threads_as_it_asks_cpus_for(run: Callable, store: Store) -> None:
    one, two = toy.threads(tag="one"), toy.threads(tag="two").on(cpus=2)
    run([one, two], store)
    assert content(store, one) == "[1] 1"
    assert content(store, two) == "[2] 2"


@seldom_on_ray
def test_notes_are_shown_and_recorded(run: Callable, store: Store) -> None:
    stream = io.StringIO()
    graph = toy.talk(tokens=500)
    outcome = run([graph], store, progress=Lines(stream, quiet=0))
    assert outcome.steps[0].notes == ("one expert was never chosen",)
    assert store.manifest(graph.key).notes == ("one expert was never chosen",)
    assert "one expert was never chosen" in stream.getvalue()
    assert "500/500 tokens" in stream.getvalue()


@seldom_on_ray
def test_a_hit_from_another_source_warns_and_is_not_computed_again(run: Callable, store: Store) -> None:
    stream = io.StringIO()
    graph = toy.number(n=1)
    run([graph], store)
    other = Step(graph.name, graph.version, toy.half(graph).fn, params=graph.params)
    assert other.key == graph.key
    outcome = run([other], store, progress=Lines(stream))
    assert (outcome.stored, len(outcome.ran)) == (1, 0)
    assert len(outcome.warnings) == 1 and "toy.number" in outcome.warnings[0] and "version" in outcome.warnings[0]
    assert outcome.warnings[0] in stream.getvalue()
    assert run([graph], store).warnings == ()


def test_a_run_renews_what_it_relies_on_and_so_keeps_all_that_is_upstream(store: Store) -> None:
    first, second = toy.half(toy.more(toy.number(n=1))), toy.half(toy.more(toy.number(n=20)))
    in_process.run([first, second], store)
    for path in Path(store.url).rglob("*"):
        os.utime(path, (time.time() - 30 * 86400,) * 2)
    in_process.run([first, toy.total(second)], store)
    modified = store.index({s.name for s in upstream([toy.total(first)])}).modified
    assert {k for k, at in modified.items() if at > time.time() - 86400} == {first.key, second.key, toy.total(second).key}
    assert gc(store).manifests == ()


@seldom_on_ray
def test_two_thousand_chained_steps_do_not_recurse(run: Callable, store: Store) -> None:
    end = toy.number(n=1)
    for _ in range(2000):
        end = toy.total(end)
    assert len(plan([end], store).keys("run")) == 2001
    outcome = run([end], store)  # a total of one number is that number: the second finds the content of the first
    assert (len(outcome.ran), outcome.aliased) == (2, 1999)
    assert content(store, end) == "1"


@seldom_on_ray
def test_a_long_chain_runs_in_its_order(run: Callable, store: Store) -> None:
    end = toy.number(n=0)
    for _ in range(60):
        end = toy.more(end)
    assert len(run([end], store).ran) == 61
    assert content(store, end) == "60"


def test_both_runners_leave_the_same_bytes(run: Callable, store: Store, tmp_path: Path) -> None:
    graph = toy.total(*(toy.half(toy.number(n=n)) for n in range(6)))
    elsewhere = Store.open(str(tmp_path / "elsewhere"))
    run([graph], store)
    in_process.run([graph], elsewhere)
    blobs = [{e.name for e in s.blobs.list("blobs/")} for s in (store, elsewhere)]
    assert blobs[0] == blobs[1] and blobs[0]


def test_a_step_whose_source_does_not_answer_runs_again_until_it_does(run: Callable, tmp_path: Path, trace: Path) -> None:
    stream = io.StringIO()
    step, store = toy.patient(trace=str(trace), until=3), Store.open(str(tmp_path / "store"), patience=60)
    assert run([step], store, progress=Lines(stream)).ran == [step.key]
    assert lines(trace) == ["asked"] * 3
    assert stream.getvalue().count("toy.patient does not answer; it is waited for, up to 1 min") == 1
    with pytest.raises(StepFailed, match="the hub does not answer"):
        run([toy.patient(trace=str(trace), until=9)], Store.open(str(tmp_path / "store")))
    assert len(lines(trace)) == 4
