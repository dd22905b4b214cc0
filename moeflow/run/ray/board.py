"""The actor that all tasks of a run on Ray talk to: it lets steps start until one fails, and collects events."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ray

Answer = Literal["yes", "closed", "worn out"]


@dataclass(frozen=True)
class Event:
    """Something a step reported: `start`, `progress` (done, total, the unit as text, a detail), `scalars` (values behind the
    optimizer step `done`), `note` (text), `done`, or `waits` (for what does not answer, named in the detail; a remark as text)."""

    kind: Literal["start", "progress", "scalars", "note", "done", "waits"]
    key: str
    done: int = 0
    total: int = 0
    text: str = ""
    detail: str = ""
    values: Mapping[str, float] = field(default_factory=dict)


class Board:
    """Holds no CPU. Keeps only the newest progress of each step."""

    def __init__(self, retries: int) -> None:
        self._open = True
        self._retries = retries
        self._starts: Counter[str] = Counter()
        self._events: list[Event] = []
        self._progress: dict[str, Event] = {}

    def may_start(self, key: str) -> Answer:
        """Whether the step may start: not after `close`, and not more often than the retries allow.

        Ray counts retries, too, but not those after it killed a worker because memory ran out: it repeats those for ever.
        """
        if not self._open:
            return "closed"
        self._starts[key] += 1
        if self._starts[key] > self._retries + 1:
            return "worn out"
        self._events.append(Event("start", key))
        return "yes"

    def forget(self, key: str) -> None:
        """Do not count the last start of a step: it waits for another run."""
        self._starts[key] -= 1

    def is_open(self) -> bool:
        """Whether steps may still start."""
        return self._open

    def close(self) -> None:
        """Let no more steps start."""
        self._open = False

    def tell(self, event: Event) -> None:
        if event.kind == "progress":
            self._progress[event.key] = event
        else:
            self._events.append(event)

    def news(self) -> list[Event]:
        """The events since the last call."""
        news = [*self._events, *self._progress.values()]
        self._events, self._progress = [], {}
        return news


RemoteBoard: Any = ray.remote(Board)
