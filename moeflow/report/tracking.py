"""What a run tells its trackers: how far it is, what it took, the figures of its result, and the courses of its fine-tunings.

Nothing is computed here: a run's events, its outcome, its reports and the `training.json` of its fine-tunings are passed on.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from moeflow.report.figures import read_figures
from moeflow.report.tracker_thread import Writer
from moeflow.run.outcome import Outcome
from moeflow.run.progress import Show
from moeflow.step import Step
from moeflow.store import NotStored, Store

TRAINING = "finetune.train"
PATIENCE = 30.0


SINGULAR = {"losses": "loss", "rates": "rate", "speeds": "tokens_per_second"}


class Tracked(Show):
    """Shows what `shown` shows, and tells the trackers meanwhile how many steps are done, and the courses of fine-tunings.

    A tracker that cannot be written to is said once and left out from then on: a run neither fails nor waits because nobody looks
    at it. At the end one that still writes is waited for; one that writes nothing for `patience` seconds is left alone.
    """

    def __init__(self, words: Sequence[str], run: str, shown: Show, about: Mapping[str, str], patience: float = PATIENCE) -> None:
        self._shown, self._began, self._done, self._patience = shown, time.monotonic(), 0, patience
        self._names: dict[str, str] = {}  # of steps, by key
        self._trainings: dict[str, str] = {}  # what the scalars of a fine-tuning begin with, by key
        self._told: set[tuple[str, int]] = set()  # a training that lost a process tells some of its steps again
        self._started: dict[str, float] = {}
        self._writers = [Writer(word, run) for word in words]
        self._each(lambda writer: writer.told(about))

    def begin(self, steps: Iterable[Step], todo: int, stored: int) -> None:
        steps = list(steps)
        self._names = {s.key: s.name for s in steps}
        keys = [s.key for s in steps if s.name == TRAINING]
        self._trainings = {key: f"finetune-{at}" if len(keys) > 1 else "finetune" for at, key in enumerate(keys)}
        self._scalars({"run/todo": todo, "run/stored": stored}, 0)
        self._shown.begin(steps, todo, stored)

    def start(self, key: str) -> None:
        self._started[key] = time.monotonic()
        self._shown.start(key)

    def progress(self, key: str, done: int, total: int, unit: str, detail: str = "") -> None:
        self._shown.progress(key, done, total, unit, detail)

    def scalars(self, key: str, at: int, values: Mapping[str, float]) -> None:
        under = self._trainings.get(key) or self._names.get(key, key)
        new = {f"{under}/{name}": float(value) for name, value in values.items() if (f"{under}/{name}", at) not in self._told}
        self._told |= {(name, at) for name in new}
        self._scalars(new, at)
        self._shown.scalars(key, at, values)

    def finish(self, key: str) -> None:
        began = self._started.pop(key, None)
        self._counted(1, {} if began is None else {f"seconds/{self._names.get(key, key)}": time.monotonic() - began})
        self._shown.finish(key)

    def taken(self, keys: list[str]) -> None:
        self._counted(len(keys))
        self._shown.taken(keys)

    def note(self, key: str, text: str) -> None:
        self._shown.note(key, text)

    def say(self, text: str) -> None:
        self._shown.say(text)

    def waits(self, where: str, remark: str) -> None:
        self._shown.waits(where, remark)

    def end(self, outcome: Outcome | None) -> None:
        self._shown.end(outcome)

    def result(self, store: Store, target: Step, ref: str, outcome: Outcome) -> None:
        """Tell what the run took, the figures of the version that it published, and the courses of its fine-tunings."""
        ran = [s for s in outcome.steps if s.state == "run"]
        took = {
            "run/steps": len(ran),
            "run/seconds": outcome.seconds,
            "run/step_seconds": sum(s.seconds for s in ran),
            "run/bytes_read": sum(s.reads for s in ran),
            "run/bytes_written": sum(s.writes for s in ran),
        }
        self._scalars({name: float(value) for name, value in took.items()}, self._done)
        self._each(lambda writer: writer.told({"version": ref, "key": target.key}))
        for figure in read_figures(store, [s.key for s in target.reports]):
            name = figure.word if figure.figure else figure.name
            for column, value in (("original", figure.original), ("compressed", figure.compressed)):
                if value is not None:
                    self._scalars({f"{column}/{name}": float(value)}, 0)
        for key in self._trainings:
            self._course(store, key)

    def __enter__(self) -> "Tracked":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for writer in self._writers:
            writer.close(failed=kind is not None)
        for writer in self._writers:
            if why := writer.waited(self._patience):
                self._shown.say(f"warning: --track {writer.word} {why}")

    def _course(self, store: Store, key: str) -> None:
        """What was not told as it came, because the training was stored before this run."""
        with suppress(NotStored, FileNotFoundError):  # its result may be stored without it, after `gc --keep-results`
            course: dict[str, Any] = json.loads(store.artifact(key).file("training.json").read_text())
            for field, name in SINGULAR.items():
                for at, value in enumerate(course.get(field) or (), 1):
                    self.scalars(key, at, {name: value})
            for validation in course.get("validations") or ():
                self.scalars(key, validation["steps"], {f"heldout/{t}": loss for t, loss in validation["losses"].items()})

    def _counted(self, steps: int, more: Mapping[str, float] = {}) -> None:
        self._done += steps
        self._scalars({"run/done": self._done, "run/elapsed": time.monotonic() - self._began, **more}, self._done)

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda writer: writer.scalars(values, step))

    def _each(self, tell: Callable[[Writer], None]) -> None:
        for writer in [*self._writers]:
            if writer.error is None:
                tell(writer)
            else:
                self._writers.remove(writer)
                self._shown.say(f"warning: --track {writer.word} {writer.lost}")
