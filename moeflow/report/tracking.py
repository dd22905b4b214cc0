"""What a run tells its trackers: how far it is, what it took, the figures of its result, and the courses of its fine-tunings.

Nothing is computed here: a run's events, its outcome, its reports and the `training.json` of its fine-tunings are passed on.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from moeflow.report.figures import read_figures
from moeflow.report.trackers import Tracker, opened
from moeflow.run.outcome import Outcome, brief
from moeflow.run.progress import Show
from moeflow.step import Step, upstream
from moeflow.store import NotStored, Store

TRAINING = "training.json"


class Tracked(Show):
    """Shows what `shown` shows, and tells the trackers how many steps are done, each time that one is.

    A tracker that cannot be written to is said once and left out from then on: a run does not fail because nobody looks at it.
    """

    def __init__(self, words: Sequence[str], run: str, shown: Show, about: Mapping[str, str]) -> None:
        self._shown, self._began, self._done = shown, time.monotonic(), 0
        self._trackers: dict[str, Tracker] = {}
        for word in words:
            with self._guarded(word):
                self._trackers[word] = opened(word, run)
        self._each(lambda tracker: tracker.told(about))

    def begin(self, steps: Iterable[Step], todo: int, stored: int) -> None:
        steps = list(steps)
        self._scalars({"run/todo": todo, "run/stored": stored}, 0)
        self._shown.begin(steps, todo, stored)

    def start(self, key: str) -> None:
        self._shown.start(key)

    def progress(self, key: str, done: int, total: int, unit: str, detail: str = "") -> None:
        self._shown.progress(key, done, total, unit, detail)

    def finish(self, key: str) -> None:
        self._counted(1)
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
        self._each(lambda tracker: tracker.told({"version": ref, "key": target.key}))
        for figure in read_figures(store, [s.key for s in target.reports]):
            name = figure.word if figure.figure else figure.name
            for column, value in (("original", figure.original), ("compressed", figure.compressed)):
                if value is not None:
                    self._scalars({f"{column}/{name}": float(value)}, 0)
        trainings = [s for s in upstream([target]) if s.name == "finetune.train"]
        for at, step in enumerate(trainings):
            self._course(store, step, f"finetune-{at}" if len(trainings) > 1 else "finetune")

    def __enter__(self) -> "Tracked":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._each(lambda tracker: tracker.close(failed=kind is not None))

    def _course(self, store: Store, step: Step, name: str) -> None:
        with suppress(NotStored, FileNotFoundError):  # its result may be stored without it, after `gc --keep-results`
            course: dict[str, Any] = json.loads(store.artifact(step.key).file(TRAINING).read_text())
            for field in ("losses", "rates", "speeds"):
                for at, value in enumerate(course.get(field) or (), 1):
                    self._scalars({f"{name}/{SINGULAR[field]}": float(value)}, at)
            for validation in course.get("validations") or ():
                for text, loss in validation["losses"].items():
                    self._scalars({f"{name}/heldout/{text}": float(loss)}, int(validation["steps"]))

    def _counted(self, steps: int) -> None:
        self._done += steps
        self._scalars({"run/done": self._done, "run/elapsed": time.monotonic() - self._began}, self._done)

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: [tracker.scalar(name, value, step) for name, value in values.items()])

    def _each(self, tell: Any) -> None:
        for word in [*self._trackers]:
            with self._guarded(word):
                tell(self._trackers[word])

    def _guarded(self, word: str) -> "_Guard":
        return _Guard(self, word)

    def lost(self, word: str, error: BaseException) -> None:
        self._trackers.pop(word, None)
        self._shown.say(f"warning: --track {word} cannot be written to, and is left out from here on: {brief(error)}")


SINGULAR = {"losses": "loss", "rates": "rate", "speeds": "tokens_per_second"}


class _Guard:
    """Whatever a tracker raises inside, which may be anything, costs the run that tracker alone."""

    def __init__(self, tracked: Tracked, word: str) -> None:
        self._tracked, self._word = tracked, word

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        self._tracked.lost(self._word, error)
        return True
