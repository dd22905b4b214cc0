"""One process of a gang on this machine: `python -m moeflow.run.child FD`, started by `children.py`, never by hand.

It receives its work over the connection `FD`, answers there, and ends when the other end closes.
"""

import os
import pickle
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from moeflow.run.gang import take_part, torn


class ToParent:
    """Sends a running step's progress, scalars and notes to the process that started this one."""

    def __init__(self, parent: Connection) -> None:
        self._parent, self._lock = parent, threading.Lock()

    def tell(self, kind: str, *what: Any) -> None:
        with self._lock:  # a step may speak from several threads
            self._parent.send((kind, *what))

    def progress(self, key: str, done: int, total: int, unit: str, detail: str) -> None:
        self.tell("progress", key, done, total, unit, detail)

    def scalars(self, key: str, at: int, values: Mapping[str, float]) -> None:
        self.tell("scalars", key, at, dict(values))

    def note(self, key: str, text: str) -> None:
        self.tell("note", key, text)

    def waits(self, where: str, remark: str) -> None:
        self.tell("waits", where, remark)


def main(parent: Connection) -> None:
    packed, store, gang, rank = pickle.loads(parent.recv_bytes())
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    reporter = ToParent(parent)
    try:
        done = take_part(pickle.loads(packed), store, reporter, gang, rank=rank, local_rank=rank)
    except BaseException as error:  # including SystemExit: the parent waits for an answer
        from moeflow.run.ray.travel import packed_error  # here: it imports ray

        reporter.tell("failed", packed_error(error), torn(error))
        threading.Event().wait()  # until it is killed: if it ended now, its peers would only report its loss
    else:
        reporter.tell("done", done)


def _end_with(parent: Connection) -> None:
    """End this process when the parent ends, even by SIGKILL: the parent sends nothing else."""
    try:
        parent.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


if __name__ == "__main__":
    handle = int(sys.argv[1])
    os.set_inheritable(handle, False)
    main(Connection(handle))
