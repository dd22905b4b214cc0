"""A step of the sources, run with the least that a step is given."""

from collections.abc import Mapping
from pathlib import Path

from moeflow.step import Step, arguments


class Running:
    """The least that a step is given; `kept` is what an interrupted run left."""

    def __init__(self, at: Path, kept: Path | None = None) -> None:
        self.out, self.scratch, self.kept = at / "out", at / "scratch", kept
        self.reads = 0
        self.stands_for: Mapping[str, str] = {}
        self.saved: list[list[str]] = []
        self.reported: list[tuple[int, int, str]] = []
        for path in (self.out, self.scratch):
            path.mkdir(parents=True)

    def progress(self, done: int, total: int, unit: str) -> None:
        self.reported.append((done, total, unit))

    def note(self, text: str) -> None:
        raise AssertionError(text)

    def link(self, artifact: object, name: str, to: str | None = None) -> None:
        raise AssertionError(name)

    def save(self, folder: Path) -> None:
        self.saved.append(sorted(p.name for p in folder.iterdir()))

    def resume(self) -> Path | None:
        return self.kept


def run(step: Step, at: Path) -> Running:
    context = Running(at)
    _, params = arguments(step.fn, step.slots, [], step.params)
    step.fn(context, **params)
    return context
