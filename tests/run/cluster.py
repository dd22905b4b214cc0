"""A Ray of two nodes on this machine, and ways to hurt it: for tests of what a run survives.

    with two_nodes() as nodes:
        pid = nodes.kill_worker("calibrate.stage")      # SIGKILL to a worker while it runs such a step
        nodes.lose()                                    # the second node goes
        nodes.replace()                                 # and another one comes
        driver = nodes.drive([sys.executable, "pipelines/mixtral.py", ...])   # a process of its own, joined to the cluster

`two_nodes` joins this process to the cluster, so that `on_ray.run` uses it.
"""

import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[2]
PATIENCE = 240.0  # seconds until something that must happen is given up


class Nodes:
    """The cluster of `two_nodes`; each node has `cpus`."""

    def __init__(self, cluster: Cluster, cpus: int) -> None:
        self._cluster, self._cpus = cluster, cpus
        self._second: Any = cluster.add_node(num_cpus=cpus)
        self._drivers: list[subprocess.Popen[str]] = []

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def workers(self, step: str) -> list[int]:
        """The processes that run a step of this name now."""
        return [p.pid for p in descendants() if title(p).startswith(f"ray::{step}")]

    def kill_worker(self, step: str) -> int:
        """SIGKILL a worker as soon as one runs a step of this name; its process id."""
        pids = until(lambda: self.workers(step), f"no worker ran {step}")
        os.kill(pids[0], signal.SIGKILL)
        return int(pids[0])

    def lose(self) -> None:
        """The second node goes at once, with all that runs there."""
        (raylet,) = self._second.all_processes["raylet"]
        workers = psutil.Process(raylet.process.pid).children(recursive=True)
        self._cluster.remove_node(self._second, allow_graceful=False)
        for worker in workers:  # they would end by themselves, only later
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        psutil.wait_procs(workers, PATIENCE)

    def replace(self) -> None:
        """A new second node."""
        self._second = self._cluster.add_node(num_cpus=self._cpus)

    def drive(self, command: Sequence[str], **env: str) -> subprocess.Popen[str]:
        """Start `command` in the repository as a driver of this cluster; output is piped."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": self.address, **env}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)  # type: ignore[call-overload]
        self._drivers.append(driver)
        return driver

    def close(self) -> None:
        for driver in self._drivers:
            if driver.poll() is None:
                driver.kill()
                driver.wait()


@contextmanager
def two_nodes(cpus: int = 1) -> Iterator[Nodes]:
    """Two nodes of `cpus` each; the first is the head, and this process is a driver there."""
    ray.shutdown()  # what other tests of this process shared
    folder = tempfile.mkdtemp(prefix="mf")  # short, because sockets lie in it
    head = {"num_cpus": cpus, "include_dashboard": False, "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = Nodes(cluster, cpus)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            yield nodes
        finally:
            nodes.close()
            ray.shutdown()
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def descendants() -> list[psutil.Process]:
    """The living processes that this one started, and those that they started."""
    return psutil.Process().children(recursive=True)


def title(process: psutil.Process) -> str:
    """A process' title, which Ray sets to the name of the task it runs; empty when it is gone."""
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return " ".join(process.cmdline())
    return ""


def until(happens: Callable[[], Any], otherwise: str, patience: float = PATIENCE) -> Any:
    """What `happens` returns as soon as that is true. Fails with `otherwise` when it does not come true."""
    end = time.monotonic() + patience
    while not (result := happens()):
        assert time.monotonic() < end, f"{otherwise} in {patience} s"
        time.sleep(0.05)
    return result


@contextmanager
def listening(greeting: bytes | None) -> Iterator[str]:
    """The address of a server that sends every client these bytes, and nothing if None."""

    class Greeter(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if greeting is not None:
                self.request.sendall(greeting)
            self.request.recv(1 << 10)
            self.request.recv(1)  # until the client goes

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Greeter) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


@contextmanager
def head(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A Ray head of two CPUs, started as operators do: its address, and its process, whose children are its services."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "--head",
        "--block",
        "--node-ip-address",
        "127.0.0.1",
        "--include-dashboard",
        "false",
        "--num-cpus",
        "2",
        "--disable-usage-stats",
    ]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *words, "--port", str(port), "--temp-dir", str(folder)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    with (folder / "head.log").open("w") as log:
        started = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    process = psutil.Process(started.pid)
    try:
        until(lambda: "Ray runtime started" in (folder / "head.log").read_text(), "no head started")
        yield f"127.0.0.1:{port}", process
    finally:
        family = [process, *process.children(recursive=True)] if process.is_running() else []
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        started.wait()
        for each in psutil.process_iter(["cmdline"]):  # what had lost its parent already
            if str(folder) in " ".join(each.info["cmdline"] or []):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
