"""Read the next thing while the present one is computed with. No torch."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(reads: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What these calls return, in order; each is made in a thread while its predecessor's result is being used.

    At most one result waits, so that as much more is held as the largest takes. An error is raised where its result was due.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[T] | None = None
        for read in reads:
            following = pool.submit(read)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
