"""The next thing is read while the present one is used: in order, one ahead, with errors where they belong."""

from collections.abc import Callable
from functools import partial
from threading import Event

import pytest

from moeflow.model.ahead import ahead


def test_the_next_is_being_read_while_the_present_one_is_used() -> None:
    begun = [Event() for _ in range(4)]

    def read(i: int) -> int:
        begun[i].set()
        return i

    for i in ahead(partial(read, i) for i in range(4)):
        assert i == 3 or begun[i + 1].wait(30)
        assert i >= 2 or not begun[i + 2].is_set(), "only one is read ahead"


def test_results_come_in_order_and_an_error_where_its_result_was_due() -> None:
    def fails() -> int:
        raise FileNotFoundError("layer 2")

    calls: list[Callable[[], int]] = [lambda: 0, lambda: 1, fails, lambda: 3]
    seen = []
    with pytest.raises(FileNotFoundError, match="layer 2"):
        for i in ahead(calls):
            seen.append(i)
    assert seen == [0, 1]
    assert [*ahead([])] == []
