"""One process of a gang on this machine: `python -m moeflow.run.child FD`, started by `children.py` and never by hand.

It is told what to do over the connection `FD`, answers there, and ends when the other end of it closes.
"""

import os
import pickle
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from moeflow.run.gang import take_part, torn


class ToParent:
    """A running step's words on their way to the process that started this one."""

    def __init__(self, parent: Connection) -> None:
        self._parent, self._lock = parent, threading.Lock()

    def tell(self, kind: str, *what: Any) -> None:
        with self._lock:  # a step may speak from several threads
            self._parent.send((kind, *what))

    def progress(self, key: str, done: int, total: int, unit: str, detail: str) -> None:
        self.tell("progress", key, done, total, unit, detail)

    def note(self, key: str, text: str) -> None:
        self.tell("note", key, text)


def main(parent: Connection) -> None:
    packed, store, gang, rank = pickle.loads(parent.recv_bytes())
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    told = ToParent(parent)
    try:
        done = take_part(pickle.loads(packed), store, told, gang, rank=rank, local_rank=rank)
    except BaseException as error:  # SystemExit, too: the parent waits for a word
        from moeflow.run.ray.travel import packed_error  # here: it imports ray

        told.tell("failed", packed_error(error), torn(error))
        threading.Event().wait()  # for the end: were it to go now, its peers would only say that they lost it
    else:
        told.tell("done", done)


def _end_with(parent: Connection) -> None:
    """Die when the parent does, even by SIGKILL: nothing else is ever sent."""
    try:
        parent.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


if __name__ == "__main__":
    handle = int(sys.argv[1])
    os.set_inheritable(handle, False)
    main(Connection(handle))
