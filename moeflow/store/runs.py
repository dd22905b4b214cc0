"""Marks of runs that are under way: what a run relies on, so that garbage collection beside it leaves that alone.

A mark is an object that its run touches twice a minute, and its time is the server's, so no machine's clock counts. A run
that died leaves a mark that ages; on its own machine it counts as dead at once, since the mark names its process. Knows no steps.
"""

import json
import threading
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from moeflow.machine import has_ended, this_process
from moeflow.store.errors import StoreError
from moeflow.store.store import Store

TOUCH = 30.0  # seconds between two signs of life; claims, which wait for a dead run, count by them
LIVE = 1800.0  # seconds since the last sign after which a run counts as dead; longer than an outage that runs wait out


class Mark:
    """This run's mark, which a thread keeps young until `end`."""

    def __init__(self, store: Store, keys: Iterable[str]) -> None:
        """Raises StoreError."""
        self._store, self.name = store, f"runs/{uuid.uuid4().hex}.{this_process()}.json"
        self._text = json.dumps(sorted({*keys})).encode()
        self._ended = threading.Event()
        store.blobs.create(self.name, self._text)
        threading.Thread(target=self._keep, daemon=True, name="mark").start()

    def end(self) -> None:
        """Delete the mark; one that cannot be deleted ages."""
        self._ended.set()
        with suppress(StoreError, OSError):
            self._store.blobs.delete([self.name])

    def _keep(self) -> None:
        while not self._ended.wait(TOUCH):
            with suppress(StoreError, OSError):
                try:
                    self._store.blobs.touch(self.name)
                except FileNotFoundError:  # this machine slept for so long that its run counted as dead
                    self._store.blobs.create(self.name, self._text)


@dataclass(frozen=True)
class Live:
    """The runs that are under way, and the keys that they rely on; `dead`: marks of runs that are not."""

    runs: int
    keys: frozenset[str]
    dead: tuple[str, ...]


def live(store: Store, now: float) -> Live:
    """Read the marks of runs that gave a sign of life lately; `now`: the server's time, seconds since the epoch."""
    marks = [*store.blobs.list("runs/")]
    alive, keys = [e.name for e in marks if e.modified > now - LIVE and not killed(e.name)], set[str]()
    for name in alive:
        with suppress(FileNotFoundError):  # its run has ended since
            keys.update(json.loads(store.blobs.read(name)))
    return Live(len(alive), frozenset(keys), tuple(e.name for e in marks if e.name not in alive))


def killed(mark: str) -> bool:
    """Whether the process of the run with this mark is known to be over: it was killed, or its mark would be gone."""
    _, _, process = mark.removesuffix(".json").partition(".")
    return has_ended(process)
