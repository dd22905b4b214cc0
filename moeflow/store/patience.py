"""Waits for what does not answer now: asks again and again, ever more rarely, until it answers or patience ends.

Who waits says so once, to the listener of its process. Knows no S3 and no runner.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TypeVar

from moeflow.store.errors import GaveUp, MayPass, NoDefault

FIRST, LONGEST = 0.5, 20.0  # seconds between two attempts; each pause is up to twice as long as the one before
AGAIN = 600.0  # seconds after which the same remark is worth repeating
T = TypeVar("T")
Listener = Callable[[str, str], None]  # what is waited for, and a remark about it
_lock = Lock()


def _nobody(where: str, remark: str) -> None:
    pass


_listener: Listener = _nobody


def wait_out(ask: Callable[[], T], seconds: float, where: str, *, offline: float = math.inf) -> T:
    """What `ask()` returns, asked again for `seconds` after its first `MayPass`. Raises what else it raises, and GaveUp.

    With `seconds` 0 nothing is waited for and the first error is raised as it is. For what a parameter is by default and no network
    leads to, `offline` seconds are the most.
    """
    began, pause = 0.0, FIRST
    while True:
        try:
            answer = ask()
        except Exception as error:
            if not seconds or not may_pass(error):
                raise
            now = time.monotonic()
            began = began or now
            most = min(seconds, offline) if isinstance(error, NoDefault) else seconds
            if now + pause > began + most:
                raise GaveUp(f"{_line(error)}; it was waited for, {duration(most)}, and run again continues there") from error
            if pause > FIRST:  # a single error is not worth a remark
                _listener(where, f"{where} does not answer; it is waited for, up to {duration(most)} ({_line(error)})")
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LONGEST)
        else:
            if pause > 2 * FIRST:
                _listener(where, f"{where} answers again")
            return answer


def may_pass(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, may pass."""
    while error is not None and not isinstance(error, GaveUp):
        if isinstance(error, MayPass):
            return True
        error = error.__cause__
    return False


@contextmanager
def heard(listener: Listener) -> Iterator[None]:
    """What is waited for inside, by any thread of this process, is told to `listener`."""
    global _listener
    with _lock:
        before, _listener = _listener, listener
    try:
        yield
    finally:
        with _lock:
            _listener = before


class Once:
    """A listener that passes a remark on to `say`, but not again within ten minutes, whoever repeats it."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: dict[tuple[str, str], float] = {}  # when, by what is waited for and how the remark begins
        self._lock = Lock()

    def __call__(self, where: str, remark: str) -> None:
        now, what = time.monotonic(), (where, remark.partition(" (")[0])
        with self._lock:
            if now - self._said.get(what, -AGAIN) < AGAIN:
                return
            self._said[what] = now
        self._say(remark)


def duration(seconds: float) -> str:
    """`90 s`, `15 min` or `12 h`: in the largest unit that comes out whole."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:g} s"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
