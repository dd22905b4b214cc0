"""Claims: a run says which step it is computing, so that another run which needs it waits instead of computing it as well.

A claim is only ever an optimisation. It counts while its run's mark (`runs.py`), which the server dates, is fresh; without it,
or when its owner is dead, or if the store cannot say, both compute, and the first commit stands.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from moeflow.store.errors import StoreError
from moeflow.store.runs import TOUCH, killed
from moeflow.store.store import Store

FRESH = 5 * TOUCH  # seconds since a run's last sign of life for which its claims count
LOOK = 3.0  # seconds until a step that another run computes is looked for again


class Busy(Exception):
    """Another run that is alive is computing this step now."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"{self.key.rpartition('-')[0]} is being computed by another run, and is waited for"


@contextmanager
def claimed(store: Store, key: str, run: str) -> Iterator[None]:
    """Claim the step `key` for the run with the mark `run`, "" for one without. Raises Busy."""
    if not run:
        yield
        return
    ours = _taken(store, key, run)
    try:
        yield
    finally:
        with suppress(StoreError, OSError):
            if ours:
                store.blobs.delete([_name(key)])


def _taken(store: Store, key: str, run: str) -> bool:
    """Claim the step; return whether the store says that the claim is ours. Raises Busy."""
    try:
        if store.blobs.create(_name(key), run.encode()):
            return True
        owner = store.blobs.read(_name(key)).decode(errors="replace")
        if owner == run:  # of a worker of ours that was lost
            return True
        mark = store.blobs.stat(owner)
        if mark is not None and mark.modified > store.blobs.now() - FRESH and not killed(owner):
            raise Busy(key)
        store.blobs.delete([_name(key)])
        return store.blobs.create(_name(key), run.encode())
    except (StoreError, OSError):
        return False  # it has been given back since, or the store cannot say


def _name(key: str) -> str:
    return f"claims/{key}"
