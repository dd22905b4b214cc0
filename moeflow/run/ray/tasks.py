"""What Ray runs on a worker for one step, and the answers that it gives. The board is asked first, and hears the words."""

from dataclasses import dataclass
from typing import Any

import ray

from moeflow.run.call import Call
from moeflow.run.materialize import Done, materialize
from moeflow.run.outcome import WorkerLost
from moeflow.run.ray.board import Answer, Event
from moeflow.run.ray.travel import portable
from moeflow.store import Store


@dataclass(frozen=True)
class Made:
    done: Done
    node: str  # where


@dataclass(frozen=True)
class Failed:
    cause: BaseException


@dataclass(frozen=True)
class Refused:
    """The step did not start, because another had failed."""


class ToBoard:
    """A running step's words on their way to the board; nobody waits for them."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def progress(self, key: str, done: int, total: int, unit: str, detail: str) -> None:
        self._board.tell.remote(Event("progress", key, done, total, unit, detail))

    def note(self, key: str, text: str) -> None:
        self._board.tell.remote(Event("note", key, text=text))


@ray.remote
def step_task(call: Call, store: Store, board: Any) -> Made | Failed | Refused:
    """A failure closes the board before anybody else hears of it, so that nothing starts after it."""
    try:
        answer: Answer = ask(board.may_start.remote(call.key))
        if answer == "closed":
            return Refused()
        if answer == "worn out":
            raise WorkerLost("the node ran out of memory")
        return made(materialize(call, store, ToBoard(board)), board)
    except Exception as error:
        return failed(error, board)


def made(done: Done, board: Any) -> Made:
    """The answer of the worker that stored a step."""
    ask(board.tell.remote(Event("done", done.key)))  # after which all that it told before has arrived
    return Made(done, ray.get_runtime_context().get_node_id())


def failed(error: BaseException, board: Any) -> Failed:
    """The answer of one that could not."""
    ask(board.close.remote())
    return Failed(portable(error))


def ask(ref: Any) -> Any:
    """What the board says. `ray.get` in a task would give its CPUs away meanwhile, and not wait to have them back."""
    return ref.future().result()
