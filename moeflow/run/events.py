"""A run as a stream of events, one JSON object a line: for programs that follow it, on the standard output with --json."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

from moeflow.run.outcome import Outcome, printable
from moeflow.run.progress import QUIET, Show
from moeflow.run.words import labels
from moeflow.step import Step


class Events(Show):
    """Every event of a run as a line of JSON; remarks go to the standard error, too, as people read them.

    begin (steps, todo, stored), start, progress (done, total, unit, at most every five seconds for each step), scalars (the values
    behind an optimizer step, by its number), finish (seconds), taken (keys of steps whose content was stored), note, say and end
    (run, stored, seconds); each has the time since the epoch, and what is of one step its key and label. No event has the keys of
    the last line of a run.
    """

    def __init__(
        self, out: TextIO | None = None, remarks: TextIO | None = None, clock: Callable[[], float] = time.time, quiet: float = QUIET
    ) -> None:
        self._out, self._remarks = out or sys.stdout, remarks or sys.stderr
        self._clock, self._quiet = clock, quiet
        self._labels: dict[str, str] = {}
        self._began: dict[str, float] = {}
        self._told: dict[str, float] = {}

    def begin(self, steps: Iterable[Step], todo: int, stored: int) -> None:
        steps = list(steps)
        self._labels = labels(steps)
        self._write("begin", steps=len(steps), todo=todo, stored=stored)

    def start(self, key: str) -> None:
        self._began[key] = self._told[key] = self._clock()
        self._of(key, "start")

    def progress(self, key: str, done: int, total: int, unit: str, detail: str = "") -> None:
        now = self._clock()
        if now - self._told.get(key, 0.0) >= self._quiet:
            self._told[key] = now
            self._of(key, "progress", done=done, total=total, unit=unit, **({"detail": detail} if detail else {}))

    def scalars(self, key: str, at: int, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no word for others
        self._of(key, "scalars", number=at, values=finite)

    def finish(self, key: str) -> None:
        began = self._began.pop(key, None)
        self._of(key, "finish", **({} if began is None else {"seconds": round(self._clock() - began, 3)}))

    def taken(self, keys: list[str]) -> None:
        self._write("taken", keys=keys)

    def note(self, key: str, text: str) -> None:
        self._of(key, "note", text=text)
        print(printable(f"{key.rpartition('-')[0]}: {text}"), file=self._remarks, flush=True)

    def say(self, text: str) -> None:
        self._write("say", text=text)
        print(printable(text), file=self._remarks, flush=True)

    def end(self, outcome: Outcome | None) -> None:
        if outcome is not None:
            done = {"run": len(outcome.ran), "stored": outcome.reused, "seconds": round(outcome.seconds, 3)}
            self._write("end", **done)

    def _of(self, key: str, event: str, **about: Any) -> None:
        self._write(event, step=self._labels.get(key, key), id=key, **about)

    def _write(self, event: str, **about: Any) -> None:
        print(json.dumps({"event": event, "at": round(self._clock(), 3)} | about), file=self._out, flush=True)
