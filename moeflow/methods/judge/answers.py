"""The record of what one model answered to one task, item by item: `answers.json`. No torch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moeflow.step import Artifact

FILE = "answers.json"


@dataclass(frozen=True)
class Metric:
    """A figure of a task: what it is called, its value, how it is made of its items' values, and which way is better."""

    name: str
    filter: str  # how the answer was found in the text, where there is more than one way
    value: float
    aggregate: str = "mean"
    higher: bool | None = True  # None: neither way is better
    guessed: bool = False  # whether guessing scores an item's `chance`
    unit: str = ""


@dataclass(frozen=True)
class Asked:
    """One item: what was asked, as a digest; its value in every metric; the score of guessing, if there is something to guess."""

    digest: str
    values: dict[str, Any]
    chance: float | None = None
    text: str = ""  # what was written
    tokens: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Answers:
    """All answers of one model to one task."""

    task: str
    metrics: dict[str, Metric]
    items: list[Asked]
    notes: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self)) + "\n")

    @staticmethod
    def read(artifact: Artifact) -> "Answers":
        raw = json.loads(artifact.file(FILE).read_text())
        metrics = {key: Metric(**metric) for key, metric in raw["metrics"].items()}
        return Answers(raw["task"], metrics, [Asked(**item) for item in raw["items"]], raw["notes"])
