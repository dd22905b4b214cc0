"""Clusters that are joined, started or lost by a run; each test has its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import ray

from moeflow.run import CannotRun, ClusterLost, in_process
from moeflow.run.ray import head as heads
from moeflow.run.ray import runner as on_ray
from moeflow.step import Step, upstream
from moeflow.store import Store
from tests.run import toy
from tests.run.cluster import PATIENCE, ROOT, head, listening, two_nodes, until

SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # what every gRPC server says first

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


@pytest.mark.parametrize("joining", [False, True])
@pytest.mark.parametrize(
    "error", [RuntimeError("versions\ndiffer"), ValueError("no port"), OSError("no /dev/shm"), Exception("slow")]
)
def test_a_ray_that_does_not_come_up_is_one_line_with_the_way_out(
    store: Store, monkeypatch: pytest.MonkeyPatch, joining: bool, error: Exception
) -> None:
    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with listening(SETTINGS) as address:
        monkeypatch.setenv("RAY_ADDRESS", address if joining else "")
        with pytest.raises(CannotRun, match="or unset RAY_ADDRESS" if joining else "or pass --runner process") as refused:
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


@pytest.mark.parametrize("there", ["nothing", "silence", "a web server", "no port"])
def test_an_address_where_no_ray_answers_is_told_before_ray_tries_for_minutes(
    there: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    greeting = {"silence": None, "a web server": b"HTTP/1.1 400 Bad Request\r\n\r\n"}.get(there, b"")
    with listening(greeting) as address:
        if there == "no port":
            address = "127.0.0.1:ray"
        if there != "nothing":
            monkeypatch.setenv("RAY_ADDRESS", address)
            with pytest.raises(CannotRun, match=f"no Ray answers at RAY_ADDRESS={address}: .*; start it, or unset RAY_ADDRESS"):
                on_ray.run([toy.number(n=1)], store)
    if there == "nothing":
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(CannotRun, match="Connection refused"):
            on_ray.run([toy.number(n=1)], store)


def test_a_loop_that_waits_for_a_dead_head_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "ASK", 0.2)
    monkeypatch.setattr(heads, "LOST", 1.0)
    for_ever, went_on = Event(), Event()

    def loop() -> None:
        went_on.set()
        for_ever.wait()

    with listening(SETTINGS) as address:
        watch = heads.Watch(address)
        heads.beside(lambda: None, watch)
        with pytest.raises(ArithmeticError):
            heads.beside(lambda: toy.number(n=1 // 0), watch)
        for _ in range(8):  # longer than it takes to lose a head that is gone
            time.sleep(0.2)
            watch.check()
    with pytest.raises(ClusterLost, match=f"the head of the Ray cluster, {address}, has not answered .*run again"):
        heads.beside(loop, watch)
    assert went_on.is_set()
    watch.close()
    for_ever.set()


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["gcs_server", "raylet", "all"])
def test_a_driver_whose_head_dies_ends_with_our_line_and_our_code(dies: str, rays: Path, tmp_path: Path) -> None:
    folder = rays / dies[:1]
    folder.mkdir()
    words = ["--store", str(tmp_path / "store"), "--json", "-p", f"until={tmp_path / 'never'}", "-p", f"trace={tmp_path / 'trace'}"]
    with head(folder) as (address, process):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        driver = subprocess.Popen([sys.executable, "tests/run/slow_pipeline.py", *words], cwd=ROOT, env=environment, **pipes)
        services = process.children(recursive=True)
        until(lambda: (tmp_path / "trace").exists(), "no step ran")
        for service in [process, *services] if dies == "all" else [s for s in services if dies in s.name()]:
            service.kill()
        printed, said = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 1
    (line,) = printed.splitlines()
    told = json.loads(line)
    assert "the Ray cluster" in told["error"] and "run again" in told["error"] and told["exit"] == 1
    assert said.splitlines() == [f"error: {told['error']}"]
