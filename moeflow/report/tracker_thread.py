"""A tracker written to in a thread of its own, so that a run never waits for one that is slow or down."""

import threading
import time
from collections.abc import Mapping
from queue import SimpleQueue

from moeflow.report.trackers import Scalar, Tracker, opened
from moeflow.run.outcome import brief

MOST = 1000  # scalars that a tracker gets at once


class Writer:
    """One tracker: what it is told waits in a queue. `error`: what it raised, if anything; it writes nothing from then on."""

    def __init__(self, word: str, run: str) -> None:
        self.word = word
        self.error: BaseException | None = None
        self._run, self._written = run, 0
        self._queue: SimpleQueue[Mapping[str, str] | Scalar | bool] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"--track {word}", daemon=True)
        self._thread.start()

    def told(self, about: Mapping[str, str]) -> None:
        self._queue.put(dict(about))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._queue.put(Scalar(name, value, step, time.time()))

    def close(self, *, failed: bool) -> None:
        self._queue.put(failed)

    def waited(self, patience: float) -> str:
        """Wait until all is written; returns why the tracker is left out, "" if it has everything."""
        written = -1
        while self._thread.is_alive() and written != self._written:
            written = self._written
            self._thread.join(patience)
        if self.error is not None:
            return self.lost
        return f"does not answer: its last {self._queue.qsize():,} numbers are not waited for" if self._thread.is_alive() else ""

    @property
    def lost(self) -> str:
        return f"cannot be written to, and is left out from here on: {brief(self.error) if self.error else ''}"

    def _work(self) -> None:
        try:
            tracker = opened(self.word, self._run)
            while self._pass_on(tracker):
                pass
        except BaseException as error:  # SystemExit, too: the run goes on
            self.error = error

    def _pass_on(self, tracker: Tracker) -> bool:
        """Pass on what waits; returns whether more may come."""
        scalars, item = [], self._queue.get()
        while isinstance(item, Scalar):
            scalars.append(item)
            if self._queue.empty() or len(scalars) == MOST:
                break
            item = self._queue.get()
        if scalars:
            tracker.scalars(scalars)
        self._written += len(scalars) or 1
        if isinstance(item, Mapping):
            tracker.told(item)
        elif isinstance(item, bool):
            tracker.close(failed=item)
            return False
        return True
