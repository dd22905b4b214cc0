"""A gang on this machine: its processes are children of this one and end with it, however it ends."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from moeflow.run.call import Call
from moeflow.run.gang import GRACE, Attempt, PeerLost
from moeflow.run.materialize import Done, stored
from moeflow.run.outcome import WorkerLost, describe
from moeflow.run.progress import Show
from moeflow.run.work import THREADS
from moeflow.store import Store, partial

LOOK = 0.2  # seconds between two checks for dead children


@dataclass
class _Child:
    rank: int
    process: "subprocess.Popen[bytes]"
    connection: Connection
    log: Path
    done: bool = False

    @property
    def died(self) -> str:
        """How it ended without an answer; empty if it is alive, has done its part, or has sent unread messages."""
        code = self.process.poll()
        if code is None or self.done or (not self.connection.closed and self.connection.poll()):
            return ""
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"process {self.rank} {how}" + (f": {last[0]}" if last else "")

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # with the processes it started
            self.process.wait()
        self.connection.close()


def run_gang(call: Call, store: Store, shown: Show, retries: int) -> Done:
    """Run a call in a gang; return what is stored. Raises what a process raises, WorkerLost and StoreError.

    If a process is lost, all start again from what they saved, at most `retries` times.
    """
    lost: PeerLost | None = None
    for _ in range(retries + 1):
        if lost is not None:
            shown.note(call.key, f"{lost}; it goes on from what was saved")
            shown.start(call.key)
        try:
            if (done := stored(call, store)) is None:
                with _children(call, store, Attempt.of(call, store)) as children:
                    done = _finished(children, shown)
        except PeerLost as error:
            lost = error
        else:
            partial.drop(store, call.key)
            return done
    raise WorkerLost(str(lost)) from lost


@contextmanager
def _children(call: Call, store: Store, gang: Attempt) -> Iterator[list[_Child]]:
    """Start the gang's processes; kill those that are left at the end."""
    children: list[_Child] = []
    with tempfile.TemporaryDirectory(prefix="moeflow-") as logs:
        try:
            environment = _environment(call, gang)
            for rank in range(gang.processes):
                children.append(_start(rank, environment, Path(logs) / f"{rank}.log"))
            if isinstance(call.code, str):
                packed = pickle.dumps(call)
            else:
                from moeflow.run.ray.travel import packed as pack  # here: it imports ray

                packed = pack(call)
            for child in children:
                with suppress(OSError):  # it has died, as `_finished` will see
                    child.connection.send_bytes(pickle.dumps((packed, store, gang, child.rank)))
            yield children
        finally:
            for child in children:
                child.end()


def _start(rank: int, environment: dict[str, str], log: Path) -> _Child:
    mine, its = Pipe()
    with its, log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "moeflow.run.child", str(its.fileno())],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that Ctrl-C on a terminal reaches only this process
        )
    return _Child(rank, process, mine, log)


def _environment(call: Call, gang: Attempt) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(gang.processes)
    place = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if "lo" in (name for _, name in socket.if_nameindex()):
        place["GLOO_SOCKET_IFNAME"] = "lo"  # a laptop's host name may resolve to an address that does not answer
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    return {**os.environ, **dict.fromkeys(THREADS, str(call.threads)), **place, **path}


def _finished(children: list[_Child], shown: Show) -> Done:
    """Wait until all have done their part; return what rank 0 stored. Raises what a process raises, and PeerLost.

    An error that a peer's end may have caused counts only if no peer dies or reports its own error within GRACE seconds.
    """
    made: Done | None = None
    torn: BaseException | None = None
    patience = 0.0
    while not all(child.done for child in children):
        for child, (kind, *what) in _messages(children):
            if kind == "progress":
                shown.progress(*what)
            elif kind == "scalars":
                shown.scalars(*what)
            elif kind == "note":
                shown.note(*what)
            elif kind == "waits":
                shown.waits(*what)
            elif kind == "done":
                child.done, made = True, what[0] or made
            elif what[1]:
                child.done, torn, patience = True, pickle.loads(what[0]), time.monotonic() + GRACE
            elif not _dead(children):
                raise pickle.loads(what[0])
        if died := _dead(children):
            raise PeerLost(died)
        if torn is not None and time.monotonic() > patience:
            break
    if torn is not None:
        raise PeerLost(describe(torn)) from torn
    assert made is not None, "rank 0 stored nothing"
    return made


def _messages(children: list[_Child]) -> Iterator[tuple[_Child, tuple[Any, ...]]]:
    """The messages they send now; nothing if none comes within LOOK seconds."""
    speaking = {child.connection: child for child in children if not child.connection.closed}
    if not speaking:
        time.sleep(LOOK)
    for connection in wait(list(speaking), LOOK):
        assert isinstance(connection, Connection)
        try:
            yield speaking[connection], connection.recv()
        except (EOFError, OSError):
            connection.close()


def _dead(children: list[_Child]) -> str:
    return ", ".join(why for child in children if (why := child.died))
