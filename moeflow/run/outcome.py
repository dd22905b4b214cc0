"""What a run did, and how a failed step is reported. Plain values; this module does no I/O."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from moeflow.extras import EXTRAS, said
from moeflow.step import Step

State = Literal["stored", "same content", "run", "not needed"]

SHOWN = 400  # characters of a step's parameters in a one-line message


class CannotRun(ValueError):
    """A run was refused before a step started; the message names the reason and the way out."""


class ClusterLost(Exception):
    """The Ray cluster, or the part of it that this run talks to, was lost during the run."""


class WorkerLost(Exception):
    """The process or node that ran a step was lost more often than the run's retries allow."""

    def __init__(self, why: str) -> None:
        super().__init__(f"its worker was lost too often ({why}); if memory ran out, say what the step needs with .on(memory=...)")


class StepFailed(Exception):
    """`step` raised `cause`, or its worker was lost too often. Nothing was stored for it."""

    def __init__(self, step: Step, cause: BaseException) -> None:
        self.step = step
        self.cause = cause
        super().__init__(
            f"{step.name} failed: {describe(cause)} (key {step.key}, parameters {shown(step.params)}); "
            "what had finished is stored, and the next run continues there"
        )


@dataclass(frozen=True)
class StepOutcome:
    """One step of the graph after the run; bytes and seconds are zero unless this run ran it."""

    key: str
    name: str
    state: State
    reads: int = 0  # bytes read from its inputs
    writes: int = 0  # bytes of its output files, without linked ones
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """All steps of the graph, inputs before the steps that read them, and the run's warnings."""

    steps: tuple[StepOutcome, ...]
    seconds: float
    warnings: tuple[str, ...] = ()
    intact: frozenset[str] = frozenset()  # digests of the blobs that this run wrote, or read and found right

    def keys(self, state: State) -> list[str]:
        return [s.key for s in self.steps if s.state == state]

    @property
    def ran(self) -> list[str]:
        """The keys of the steps that were computed, in the order of the graph."""
        return self.keys("run")

    @property
    def aliased(self) -> int:
        """How many steps reused the result of another recipe on inputs with the same contents."""
        return len(self.keys("same content"))

    @property
    def stored(self) -> int:
        """How many steps were stored before the run."""
        return len(self.keys("stored"))

    @property
    def reused(self) -> int:
        """How many steps were not computed because their result was in the store."""
        return self.stored + self.aliased


def describe(error: BaseException) -> str:
    """An exception as part of one line."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRAS:
        return said(str(error.name))
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def printable(text: str) -> str:
    """The text with what a terminal would obey, such as codes for colours and cursors, written out as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def brief(error: BaseException) -> str:
    """The first line of an exception, for those with long messages, such as Ray's."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def shown(params: dict[str, Any]) -> str:
    """Parameters on one line, cut off after SHOWN characters."""
    text = json.dumps(params, sort_keys=True)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"
