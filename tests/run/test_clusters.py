"""Clusters that are joined, started or lost by a run; each test has its own."""

from pathlib import Path
from threading import Thread

import pytest
import ray

from moeflow.run import CannotRun, in_process
from moeflow.run.ray import runner as on_ray
from moeflow.step import Step, upstream
from moeflow.store import Store
from tests.run import toy
from tests.run.cluster import two_nodes, until

pytestmark = pytest.mark.usefixtures("no_ray")


def test_what_needs_no_work_needs_no_ray(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # where nothing listens
    in_process.run([toy.total(toy.half(toy.number(n=6))), toy.half(toy.number(n=7))], store)
    assert on_ray.run([toy.total(toy.half(toy.number(n=6)))], store).stored == 3
    assert on_ray.run([toy.total(toy.half(toy.number(n=7)))], store).aliased == 1
    assert not ray.is_initialized()


def test_an_address_of_a_job_server_is_refused_with_the_way_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(CannotRun, match="ray job submit"):
        on_ray.run([toy.number(n=1)], store)


@pytest.mark.parametrize("address", ["", "10.0.0.1:6379"])
@pytest.mark.parametrize(
    "error", [RuntimeError("versions\ndiffer"), ValueError("no port"), OSError("no /dev/shm"), Exception("slow")]
)
def test_a_ray_that_does_not_come_up_is_one_line_with_the_way_out(
    store: Store, monkeypatch: pytest.MonkeyPatch, address: str, error: Exception
) -> None:
    def init(**_: object) -> None:
        raise error

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(CannotRun, match="or unset RAY_ADDRESS" if address else "or pass --runner process") as refused:
        on_ray.run([toy.number(n=1)], store)
    assert "\n" not in str(refused.value) and str(error).split()[-1] in str(refused.value)


def test_a_ray_of_ones_own_that_is_slow_to_start_gets_a_second_try(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself gives up after half a minute, which a machine with much else to do may need."""
    tries: list[Exception] = [
        Exception("The current node timed out during startup. This could happen because"), OSError("the disk is full")
    ]  # fmt: skip

    def init(**_: object) -> None:
        raise tries.pop(0)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(CannotRun, match="the disk is full"):
        on_ray.run([toy.number(n=1)], store)
    assert not tries


@pytest.mark.slow
def test_a_step_too_large_for_a_ray_of_ones_own_is_refused_before_anything_starts(
    store: Store, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    large = toy.total(toy.number(n=1, trace=str(trace))).on(cpus=1000)
    with pytest.raises(CannotRun, match=r"toy\.total asks for 1000 CPUs"):
        on_ray.run([large], store)
    assert trace.read_text() == ""
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_lost_worker_and_a_lost_node_leave_the_same_bytes_as_an_undisturbed_run(store: Store, tmp_path: Path) -> None:
    def graph(release: Path) -> Step:
        shards = [toy.slow(n=n, until=str(release)) for n in range(3)]
        stages = [toy.half(toy.half(s)) for s in shards]
        return toy.total(*stages)

    release = tmp_path / "release"
    target = graph(release)
    with two_nodes() as nodes:
        running = Thread(target=lambda: on_ray.run([target], store))
        running.start()
        killed = nodes.kill_worker("toy.slow")
        until(lambda: killed not in nodes.workers("toy.slow") and len(nodes.workers("toy.slow")) == 2, "no retry")
        nodes.lose()
        nodes.replace()
        release.touch()
        running.join()
        assert store.has(target.key)
        assert store.artifact(target.key).file("n").read_text().strip() == "3"
    undisturbed = Store.open(str(tmp_path / "undisturbed"))
    in_process.run([target], undisturbed)
    digests = [{k: m.digest for k, m in s.manifests(_keys(target)).items()} for s in (store, undisturbed)]
    assert digests[0] == digests[1] and len(digests[0]) == 10


def _keys(target: Step) -> list[str]:
    return [s.key for s in upstream([target])]
