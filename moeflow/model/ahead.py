"""Read the next thing while the present one is computed with. No torch."""

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(things: Iterable[T]) -> Generator[T, None, None]:
    """These things in order; each is made in a thread of its own while its predecessor is being used.

    At most one waits, so that as much more is held as the largest takes. An error is raised where its thing was due.
    """
    made, end = iter(things), object()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, made, end)
        while (thing := waiting.result()) is not end:
            waiting = pool.submit(next, made, end)
            yield thing  # type: ignore[misc]
