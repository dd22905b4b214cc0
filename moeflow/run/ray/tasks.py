"""What Ray runs on a worker for one step, and its answers. It asks the board first, and reports to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from moeflow.run.call import Call
from moeflow.run.materialize import Done, materialize
from moeflow.run.outcome import WorkerLost
from moeflow.run.ray.board import Answer, Event
from moeflow.run.ray.travel import portable
from moeflow.store import Store
from moeflow.store.claims import Busy


@dataclass(frozen=True)
class Made:
    done: Done
    node: str  # where it ran


@dataclass(frozen=True)
class Failed:
    cause: BaseException


@dataclass(frozen=True)
class Refused:
    """The step did not start, because another one failed."""


class ToBoard:
    """Sends a running step's progress, scalars and notes to the board, without waiting."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def progress(self, key: str, done: int, total: int, unit: str, detail: str) -> None:
        self._board.tell.remote(Event("progress", key, done, total, unit, detail))

    def scalars(self, key: str, at: int, values: Mapping[str, float]) -> None:
        self._board.tell.remote(Event("scalars", key, at, values=dict(values)))

    def note(self, key: str, text: str) -> None:
        self._board.tell.remote(Event("note", key, text=text))

    def waits(self, where: str, remark: str) -> None:
        self._board.tell.remote(Event("waits", "", text=remark, detail=where))


@dataclass(frozen=True)
class Postponed:
    """Another run computes the step now."""

    why: str


@ray.remote
def step_task(call: Call, store: Store, board: Any, run: str) -> Made | Failed | Refused | Postponed:
    """Run one step. A failure closes the board before it is reported, so that nothing starts after it."""
    try:
        answer: Answer = ask(board.may_start.remote(call.key))
        if answer == "closed":
            return Refused()
        if answer == "worn out":
            raise WorkerLost("the node ran out of memory")
        return made(materialize(call, store, ToBoard(board), run), board)
    except Busy as busy:
        ask(board.forget.remote(call.key))
        return Postponed(str(busy))
    except Exception as error:
        return failed(error, board)


def made(done: Done, board: Any) -> Made:
    """The answer of the worker that stored a step."""
    ask(board.tell.remote(Event("done", done.key)))  # when this returns, all its earlier events have arrived
    return Made(done, ray.get_runtime_context().get_node_id())


def failed(error: BaseException, board: Any) -> Failed:
    """Close the board; the answer of a worker whose step failed."""
    ask(board.close.remote())
    return Failed(portable(error))


def ask(ref: Any) -> Any:
    """Wait for the board's answer. `ray.get` in a task would release its CPUs meanwhile, and not wait to get them back."""
    return ref.future().result()
