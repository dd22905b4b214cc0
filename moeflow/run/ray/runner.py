"""Run a graph on a Ray cluster: one step is one task, named after the step, and a gang's task drives its processes.

Only calls and keys go through Ray, bytes go through the store, so a lost node costs only the steps it was running. The
cluster is not touched before a step has to run. Knows neither torch nor models.
"""

import logging
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
from ray._private.worker import get_dashboard_url
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moeflow.run.call import Call
from moeflow.run.ledger import Ledger, follow
from moeflow.run.options import Options
from moeflow.run.outcome import CannotRun, ClusterLost, Outcome, StepFailed, WorkerLost, brief, describe
from moeflow.run.progress import Show
from moeflow.run.ray.board import Event, RemoteBoard
from moeflow.run.ray.gang import gang_task
from moeflow.run.ray.head import answers, beside, quiet, watched
from moeflow.run.ray.metrics import Metrics
from moeflow.run.ray.nodes import Nodes, demand, free_orphans, largest, offers, too_large
from moeflow.run.ray.tasks import Failed, Made, Postponed, step_task
from moeflow.run.ray.travel import take_along
from moeflow.sources.steps import folders_read
from moeflow.step import Step
from moeflow.store import Index, LocalBlobs, Store
from moeflow.store.claims import LOOK as WAIT

HEARTBEAT = 0.2  # seconds between two requests to the board
LOOK = 5.0  # seconds between two counts of the cluster's CPUs


def run(
    targets: Iterable[Step],
    store: Store,
    *,
    progress: Show | None = None,
    options: Options | None = None,
    index: Index | None = None,
) -> Outcome:
    """Store the targets and what they need. Raises StepFailed; steps that were finished or running are stored.

    Uses the Ray that is up in this process, else joins RAY_ADDRESS, else starts one on this machine for this run. Raises
    CannotRun if that one does not start or could never run a step, or if no Ray answers at RAY_ADDRESS; ClusterLost if
    the cluster is lost during the run.
    """

    def execute(ledger: Ledger) -> None:
        if ledger.left:
            with connected() as own, watched() as watch:
                _tell_dashboard(ledger.show)
                with _Drive(ledger, options or Options(), own=own) as drive:
                    beside(drive.loop, watch)

    try:
        return follow(targets, store, execute, progress, index)
    except RayError as error:
        raise ClusterLost(
            f"the Ray cluster was lost ({brief(error)}); what had finished is stored: see that the cluster is up, then run again"
        ) from error


def _tell_dashboard(show: Show) -> None:
    """Say where Ray's dashboard is, if the cluster has one."""
    url = get_dashboard_url()
    if url:
        show.say(f"Ray's dashboard: http://{url.removeprefix('http://')}")


@contextmanager
def connected() -> Iterator[bool]:
    """Connect to Ray, and disconnect at the end if this connected; yield whether the cluster is this process's own."""
    if ray.is_initialized():
        yield False
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address and not address.startswith("ray://"):
        raise CannotRun(
            f"RAY_ADDRESS={address} is a job server, which cannot run steps by itself; submit the pipeline to it with "
            "`ray job submit --working-dir . -- python PIPELINE.py`, or unset RAY_ADDRESS"
        )
    if address and ":" in address and (why := answers(address)):
        raise CannotRun(f"no Ray answers at RAY_ADDRESS={address}: {why}; start it, or unset RAY_ADDRESS")
    # Without address="local" Ray would try to join a dead head that left its address behind.
    quietly: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    stop = signal.getsignal(signal.SIGTERM)
    start = partial(ray.init, address=address or "local", include_dashboard=None if address else False, **quietly)
    try:
        try:
            with quiet(joining=bool(address)):
                start()
        except Exception as error:  # Ray raises anything here, plain Exception included
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()  # it waits for half a minute, which a busy machine may need twice
            start()
    except Exception as error:
        raise CannotRun(_unstarted(address, error)) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)  # Ray's own handler ends the process without our message
    try:
        yield not address
    except ClusterLost:  # then leaving it would wait for the head
        raise
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()


class _Drive:
    """The driver's loop: it submits what may run, waits, and shows the board's events."""

    def __init__(self, ledger: Ledger, options: Options, *, own: bool) -> None:
        self._ledger, self._store, self._show, self._options = ledger, ledger.store, ledger.show, options
        self._running: dict[Any, Call] = {}
        self._waiting: deque[tuple[float, Call]] = deque()  # what other runs compute, and when to look for it again
        self._failure: StepFailed | None = None
        self._ended, self._turn = False, threading.Lock()
        self._cpus, self._looked = 0, -LOOK  # the cluster's CPUs, and when they were counted
        self._nodes = Nodes(self._store, {key: listed.bytes for key, listed in ledger.schedule.index.keys.items()})
        # A cluster without GPUs computes on CPUs, unless GPUs were asked for: an autoscaler may add them.
        self._gpus = options.gpus is not None or any(offer.get("GPU") for offer in offers())
        self._check(own)
        self._metrics = Metrics()
        free_orphans()
        # The board and the gangs' tasks hold no CPU and must not get lost: they run on the driver's own node.
        self._here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Without task events: the dashboard is for steps, and the board is asked several times a second.
        self._board = RemoteBoard.options(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=self._here, enable_task_events=False
        ).remote(options.retries)

    def __enter__(self) -> "_Drive":
        return self

    def __exit__(self, kind: type[BaseException] | None, *why: object) -> None:
        """Leave nothing behind, on Ctrl-C too: running steps are cancelled and waiting ones never start."""
        self._ended = True
        if kind is not None and issubclass(kind, ClusterLost):
            return
        if self._turn.acquire(timeout=LOOK):  # the loop, in a thread of its own, submits nothing more
            self._turn.release()
        if self._running:
            ray.wait([self._board.close.remote()], timeout=1)  # must arrive before the board is killed
            for ref in self._running:
                ray.cancel(ref, force=True)
        ray.kill(self._board)

    def loop(self) -> None:
        """Run all steps. Raises StepFailed when the steps that ran at the first failure have finished."""
        while not self._ended:
            with self._turn:
                self._round()
        if self._failure is not None:
            raise self._failure

    def _round(self) -> None:
        """Submit what may run, and collect what has finished by now."""
        if self._failure is None and not self._ended:
            while self._waiting and self._waiting[0][0] <= time.monotonic():
                self._submit(self._waiting.popleft()[1])
            for call in self._ledger.schedule.ready(self._room()):
                self._submit(call)
        if not self._running and self._waiting and self._failure is None:
            time.sleep(HEARTBEAT)
            return
        if not self._running:
            self._ended = True
            return
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=HEARTBEAT)
        self._pass_on(ray.get(self._board.news.remote()))
        for ref in ready:
            self._collect(ref, self._running.pop(ref))
        if ready:
            self._ledger.settle()

    def _check(self, own: bool) -> None:
        """Refuse a step that no node can run, which would wait for ever; only warn if an autoscaler might add the node."""
        there = len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})
        if there > 1 and isinstance(self._store.blobs, LocalBlobs):
            self._ledger.warn(
                f"the store {self._store.url} is a folder and the cluster has {there} machines: all of them must see "
                "that folder, or pass --store s3://bucket/prefix"
            )
        schedule, nodes = self._ledger.schedule, offers()
        steps = [schedule.steps[key] for key, state in schedule.states.items() if state == "run"]
        for folder in folders_read(steps) if there > 1 else ():
            self._ledger.warn(
                f"the source {folder} is a folder and the cluster has {there} machines: all of them must see it, or put it in S3"
            )
        if not own and not self._gpus and any(s.resources.gpus for s in steps):
            self._ledger.warn(
                "the cluster has no GPU now: steps that compute with a model run on CPUs; say --gpus 1 to wait for GPU nodes"
            )
        problems = {too_large(s, nodes, gpus=self._gpus): None for s in steps}
        for problem in filter(None, problems):
            if own:
                raise CannotRun(f"{problem}; place it with .on(cpus=..., memory=...), or run on a larger cluster")
            self._ledger.warn(f"{problem}; it waits until such a node joins the cluster")

    def _room(self) -> int:
        """How many more steps may run or queue. A queue keeps CPUs busy, and shows an autoscaler what is needed."""
        if (most := self._options.in_flight) == 0:
            if time.monotonic() - self._looked > LOOK:
                self._looked, self._cpus = time.monotonic(), int(ray.cluster_resources().get("CPU", 0))
            most = 2 * self._cpus + 8
        return max(0, most - len(self._running))

    def _submit(self, call: Call) -> None:
        take_along(call)
        step = self._ledger.schedule.steps[call.key]
        asked = demand(step, gpus=self._gpus, most=largest(offers()) if step.spec.optional else math.inf)
        try:
            if call.resources.processes:
                ref = gang_task.options(
                    name=call.record.step, num_cpus=0, max_retries=self._options.retries, scheduling_strategy=self._here
                ).remote(call, self._store, self._board, asked, self._options.run)
            else:
                ref = step_task.options(
                    name=call.record.step,
                    num_cpus=asked.get("CPU", 0),
                    num_gpus=asked.get("GPU", 0),
                    memory=asked.get("memory"),
                    max_retries=self._options.retries,
                    scheduling_strategy=self._nodes.near(call),
                ).remote(call, self._store, self._board, self._options.run)
        except (TypeError, AttributeError) as error:  # what the function refers to cannot be pickled
            self._fail(call, error)
        else:
            self._running[ref] = call

    def _collect(self, ref: Any, call: Call) -> None:
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            self._fail(call, error.cause if isinstance(error.cause, Exception) else error)
        except RayError as error:
            self._fail(call, WorkerLost(brief(error)))
        else:
            if isinstance(result, Failed):
                self._fail(call, result.cause)
            elif isinstance(result, Postponed):
                self._show.waits("another run", result.why)
                self._metrics.postponed(call.key)
                self._waiting.append((time.monotonic() + WAIT, call))
            elif isinstance(result, Made):
                self._nodes.holds(call, result.node, result.done.bytes)
                self._ledger.done(result.done)
                self._metrics.done(result.done)

    def _fail(self, call: Call, cause: BaseException) -> None:
        """Keep the first failure, to raise it at the end; show those of steps that were running then."""
        ray.get(self._board.close.remote())
        failure = StepFailed(self._ledger.schedule.steps[call.key], cause)
        failure.__cause__ = cause
        if self._failure is None:
            self._failure = failure
        else:
            self._show.say(f"also: {failure}")

    def _pass_on(self, news: Iterable[Event]) -> None:
        for event in news:
            if event.kind == "start":
                self._show.start(event.key)
                self._metrics.started(event.key)
            elif event.kind == "progress":
                self._show.progress(event.key, event.done, event.total, event.text, event.detail)
            elif event.kind == "scalars":
                self._show.scalars(event.key, event.done, event.values)
            elif event.kind == "note":
                self._show.note(event.key, event.text)
            elif event.kind == "waits":
                self._show.waits(event.detail, event.text)


def _unstarted(address: str, error: Exception) -> str:
    if not address:
        return f"no Ray could be started here: {describe(error)}; free memory and disk for it, or pass --runner process"
    if isinstance(error, ConnectionError):
        return f"no Ray answers at {address}: {describe(error)}; start it, or unset RAY_ADDRESS"
    return (
        f"the Ray at {address} cannot be joined: {describe(error)}; see that the address is right and that it has the "
        "Ray and Python of this machine, or unset RAY_ADDRESS"
    )
