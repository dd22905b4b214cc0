"""How a run shows its progress: live bars on a terminal, throttled plain lines elsewhere, only notes with JSON.

It shows what a runner reports and decides nothing; both runners report the same.
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from moeflow.run.outcome import Outcome, printable
from moeflow.run.words import amount, clock, count, labels, summary
from moeflow.step import Step
from moeflow.store.patience import Once

QUIET = 5.0  # seconds between two plain lines of one step


class Show:
    """Receives what a runner reports, and shows nothing of it. Steps are named by key."""

    @cached_property
    def _once(self) -> Once:
        return Once(self.say)

    def begin(self, steps: Iterable[Step], todo: int, stored: int) -> None:
        """`todo` steps are not stored; `stored` are."""

    def start(self, key: str) -> None: ...

    def progress(self, key: str, done: int, total: int, unit: str, detail: str = "") -> None: ...

    def scalars(self, key: str, at: int, values: Mapping[str, float]) -> None:
        """Numbers of a step's course, behind its optimizer step `at`."""

    def finish(self, key: str) -> None:
        """The step is stored."""

    def taken(self, keys: list[str]) -> None:
        """These steps reuse what other recipes made from the same contents."""

    def note(self, key: str, text: str) -> None:
        """A remark of a step."""

    def say(self, text: str) -> None:
        """A warning or remark about the run, one line."""

    def waits(self, where: str, remark: str) -> None:
        """Something does not answer, and is waited for: said once, whoever waits."""
        self._once(where, remark)

    def end(self, outcome: Outcome | None) -> None:
        """Restore the terminal; sum up the outcome, if there is one, in a line."""


def show(*, json: bool = False, stream: TextIO | None = None) -> Show:
    """The display for the stream (stderr): bars on a terminal, plain lines otherwise, only notes for JSON."""
    stream = stream or sys.stderr
    if json:
        return Silent(stream)
    return Bars(stream) if stream.isatty() else Lines(stream)


class Silent(Show):
    """Shows only remarks and warnings."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def note(self, key: str, text: str) -> None:
        self.say(f"{key.rpartition('-')[0]}: {text}")

    def say(self, text: str) -> None:
        print(printable(text), file=self._stream, flush=True)


@dataclass
class _Running:
    number: int
    began: float
    said: float
    first: tuple[float, int] | None = None  # when it first reported progress, and how far it was


@dataclass
class Lines(Show):
    """Plain lines, as in `[ 3/12] calibrate.stage layers 0-7  4,096/8,192 tokens  00:12`."""

    stream: TextIO
    clock: Callable[[], float] = time.monotonic
    quiet: float = QUIET
    _labels: dict[str, str] = field(default_factory=dict)
    _running: dict[str, _Running] = field(default_factory=dict)
    _todo: int = 0
    _begun: int = 0

    def begin(self, steps: Iterable[Step], todo: int, stored: int) -> None:
        steps = list(steps)
        self._labels, self._todo = labels(steps), todo
        if todo:
            self.say(f"{count(len(steps), 'step')}: {todo:,} to do, {stored:,} stored")

    def start(self, key: str) -> None:
        now = self.clock()
        if key not in self._running:  # a step that starts again keeps its number
            self._begun += 1
            self._running[key] = _Running(self._begun, now, now)

    def progress(self, key: str, done: int, total: int, unit: str, detail: str = "") -> None:
        step, now = self._running.get(key), self.clock()
        if step is None:
            return
        if step.first is None:
            step.first = now, done  # a resumed step does not begin at zero
        if now - step.said < self.quiet:
            return
        step.said = now
        words = [amount(done, total, unit), clock(now - step.began)]
        if detail:
            words.insert(1, detail)
            begun, at = step.first
            if done > at and total:  # else the time left cannot be estimated yet
                words.append(f"{clock((total - done) * (now - begun) / (done - at))} left")
        self.say("  ".join([f"{self._head(step.number)} {self._label(key)}", *words]))

    def finish(self, key: str) -> None:
        if (step := self._running.pop(key, None)) is not None:
            self.say(f"{self._head(step.number)} {self._label(key)}  done  {clock(self.clock() - step.began)}")

    def taken(self, keys: list[str]) -> None:
        self._begun += len(keys)
        who = self._label(keys[0]) if len(keys) == 1 else f"{count(len(keys), 'step')}, {self._label(keys[0])} first"
        self.say(f"{self._head(self._begun)} {who}  same content as stored")

    def note(self, key: str, text: str) -> None:
        self.say(f"{self._label(key)}: {text}")

    def say(self, text: str) -> None:
        print(printable(text), file=self.stream, flush=True)

    def end(self, outcome: Outcome | None) -> None:
        if outcome is not None:
            self.say(summary(outcome))

    def _head(self, number: int) -> str:
        return f"[{number:>{len(str(self._todo))}}/{self._todo}]"

    def _label(self, key: str) -> str:
        return self._labels.get(key, key)


class Bars(Show):
    """One bar for the steps, and one for each running step in its own unit, with the time left."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Amount(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
        )
        self._labels: dict[str, str] = {}
        self._running: dict[str, TaskID] = {}
        self._whole: TaskID | None = None

    def begin(self, steps: Iterable[Step], todo: int, stored: int) -> None:
        self._labels = labels(list(steps))
        self._whole = self._bars.add_task("steps", total=todo, unit=f"steps, {stored:,} stored")
        self._bars.start()

    def start(self, key: str) -> None:
        if key in self._running:
            self._bars.reset(self._running[key])
        else:
            self._running[key] = self._bars.add_task(self._labels.get(key, key), total=None, unit="")

    def progress(self, key: str, done: int, total: int, unit: str, detail: str = "") -> None:
        if key in self._running:
            self._bars.update(self._running[key], completed=done, total=total or None, unit=unit, detail=detail)

    def finish(self, key: str) -> None:
        if (task := self._running.pop(key, None)) is not None:
            self._bars.remove_task(task)
        self._advance(1)

    def taken(self, keys: list[str]) -> None:
        self._advance(len(keys))

    def refresh(self) -> None:
        """Draw now instead of a tenth of a second later."""
        self._bars.refresh()

    def _advance(self, steps: int) -> None:
        if self._whole is not None:
            self._bars.advance(self._whole, steps)

    def note(self, key: str, text: str) -> None:
        self.say(f"{self._labels.get(key, key)}: {text}")

    def say(self, text: str) -> None:
        self._console.print(Text(printable(text)))

    def end(self, outcome: Outcome | None) -> None:
        self._bars.stop()
        if outcome is not None:
            self._console.print(Text(summary(outcome)))


class _Amount(ProgressColumn):
    """How far a step is, and its detail on a second line."""

    def render(self, task: Task) -> Text:
        if not task.total:
            return Text("")
        unit, detail = (str(task.fields.get(name, "")) for name in ("unit", "detail"))
        return Text("\n".join([amount(int(task.completed), int(task.total), unit), *filter(None, [detail])]))
