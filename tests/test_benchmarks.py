"""The benchmarks can be run, and say whether a claim held. They assert no time, and neither do these."""

import importlib

import pytest

from benchmarks.__main__ import ALL, page
from benchmarks.rows import Row


@pytest.mark.parametrize("name", ALL)
def test_every_benchmark_is_there(name: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


def test_a_claim_holds_on_the_right_side_of_its_bound() -> None:
    assert Row("faster", 13.1, "at least", 13, "times").holds and not Row("faster", 12.9, "at least", 13, "times").holds
    assert Row("slower", 1.2, "at most", 1.3, "times").holds and not Row("slower", 1.4, "at most", 1.3, "times").holds
    assert Row("slower", 1.4, "at most", 1.3, "times").line() == "| slower | 1.4 times | at most 1.3 | NO |"


def test_a_benchmark_that_is_run_again_leaves_what_other_commands_measured() -> None:
    whole = page({"chaos": "## chaos\n", ALL[1]: f"## {ALL[1]}\n", ALL[0]: f"## {ALL[0]}\n"})
    assert [line for line in whole.splitlines() if line.startswith("## ")] == [f"## {ALL[0]}", f"## {ALL[1]}", "## chaos"]
