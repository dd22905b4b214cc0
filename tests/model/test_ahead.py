"""The next thing is read while the present one is used: in order, one ahead, with errors where they belong."""

from collections.abc import Iterator
from threading import Event

import pytest

from moeflow.model.ahead import ahead


def test_the_next_is_being_read_while_the_present_one_is_used() -> None:
    begun = [Event() for _ in range(4)]

    def read(i: int) -> int:
        begun[i].set()
        return i

    for i in ahead(map(read, range(4))):
        assert i == 3 or begun[i + 1].wait(30)
        assert i >= 2 or not begun[i + 2].is_set(), "only one is read ahead"


def test_things_come_in_order_and_an_error_where_its_thing_was_due() -> None:
    def things() -> Iterator[int]:
        yield from (0, 1)
        raise FileNotFoundError("layer 2")

    seen = []
    with pytest.raises(FileNotFoundError, match="layer 2"):
        for i in ahead(things()):
            seen.append(i)
    assert seen == [0, 1]
    assert [*ahead(())] == []


def test_one_ahead_of_another_is_two_ahead() -> None:
    """A file is fetched while the one before is moved to a GPU and a third is computed with."""
    begun = [Event() for _ in range(4)]

    def read(i: int) -> int:
        begun[i].set()
        return i

    things = ahead(ahead(map(read, range(4))))
    assert next(things) == 0
    assert begun[2].wait(30)
    things.close()
