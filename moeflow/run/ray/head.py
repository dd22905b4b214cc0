"""Whether the head of a cluster is there. Ray itself asks for minutes, and then ends the process in its own words.

Asked is its GCS, the service that knows a cluster's nodes and jobs, by the first frame that every gRPC server sends.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, TimeoutError
from contextlib import contextmanager

import ray

from moeflow.run.outcome import ClusterLost

ASK = 5.0  # seconds between two questions, and until one counts as not answered
LOST = 40.0  # seconds without an answer; after 60 Ray's own code ends the process
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # with no settings
SETTINGS = 4


def answers(address: str, seconds: float = ASK) -> str:
    """Why no gRPC server answers at `host:port`; empty if one does."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), seconds) as asked:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return ""  # it speaks only to those who have its certificate
            asked.settimeout(seconds)
            asked.sendall(GREETING)
            frame = asked.recv(9)
    except (OSError, ValueError, OverflowError) as error:
        return str(error) or type(error).__name__
    return "" if len(frame) > 3 and frame[3] == SETTINGS else "something else than Ray answers there"


class Watch:
    """Asks the head of the cluster that this process has joined again and again, in a thread of its own."""

    def __init__(self, address: str) -> None:
        self._address, self._end = address, threading.Event()
        self._answered = time.monotonic()
        threading.Thread(target=self._ask, daemon=True).start()

    def check(self) -> None:
        """Raise ClusterLost if the head has not answered for LOST seconds."""
        if time.monotonic() - self._answered > LOST:
            raise ClusterLost(
                f"the head of the Ray cluster, {self._address}, has not answered for {LOST:.0f} seconds; what had finished is "
                "stored: see that the cluster is up, then run again"
            )

    def close(self) -> None:
        self._end.set()

    def _ask(self) -> None:
        while not self._end.is_set():
            if not answers(self._address):
                self._answered = time.monotonic()
            self._end.wait(ASK)


@contextmanager
def watched() -> Iterator[Watch]:
    watch = Watch(ray.get_runtime_context().gcs_address)
    try:
        yield watch
    finally:
        watch.close()


@contextmanager
def quiet(*, joining: bool) -> Iterator[None]:
    """Start Ray inside, and neither its log nor a dead node's appears between the lines of the run."""
    import ray._private.worker as internal

    internal.print_to_stdstream = lambda *_, **__: None  # in spite of log_to_driver=False it prints what a dead node last logged
    if not joining:
        yield
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    sys.stderr.flush()
    os.dup2(nowhere, 2)  # for as long as it says, in this process's stderr, which level that is
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def beside(loop: Callable[[], None], watch: Watch) -> None:
    """Run `loop` in a thread, because once the head is gone a call into Ray may never return.

    Raises what it raises, and ClusterLost.
    """
    done: Future[None] = Future()

    def run() -> None:
        try:
            loop()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True, name="drive").start()
    while True:
        try:
            return done.result(timeout=0.5)
        except TimeoutError:
            if done.done():
                raise
            watch.check()
