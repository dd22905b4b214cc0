"""Options as values: what of them stands in a key, and that a step is given them back."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from moeflow.options import check_choices, described, docs_of, plain, restored
from moeflow.step import Context, Spec, Step, step


@dataclass(frozen=True)
class Grid:
    bits: int = 4
    """Bits of a weight,
    packed."""


@dataclass(frozen=True)
class Slimming:
    """What is done to a matrix."""

    method: Literal["gptq", "awq"]
    """By what."""
    rate: float = 0.5
    layers: tuple[int, ...] = ()
    grid: Grid | None = None
    names: tuple[str, ...] = field(default_factory=lambda: ("up",))

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class More(Slimming):
    tasks: int = 1
    """Between how many tasks."""


def spec_of(*, how: Slimming | None) -> Spec:
    return Spec(how)


@step("test.slim", version=1, spec=spec_of)
def slim(context: Context, *, how: Slimming | None) -> None: ...


def made(how: Slimming | None) -> Step:
    return slim(how=how)


def test_a_key_holds_only_the_fields_that_differ_from_their_defaults() -> None:
    assert made(Slimming("gptq")).params == {"how": {"method": "gptq"}}
    assert made(Slimming("gptq", rate=0.5, names=("up",))).key == made(Slimming("gptq")).key
    assert made(Slimming("gptq", grid=Grid())).params == {"how": {"method": "gptq", "grid": {}}}
    keys = {made(how).key for how in (None, Slimming("gptq"), Slimming("awq"), Slimming("gptq", layers=(1,)))}
    assert len(keys) == 4


def test_a_number_has_one_form_whatever_its_spelling() -> None:
    assert made(Slimming("gptq", rate=1)).key == made(Slimming("gptq", rate=1.0)).key


@pytest.mark.parametrize("how", [None, Slimming("awq", 0.25, (1, 2), Grid(3), ("a", "b")), Slimming("gptq")])
def test_a_step_is_given_the_value_back(how: Slimming | None) -> None:
    assert made(how).spec.output == how
    assert restored(plain(how), Slimming | None) == how


def test_a_choice_that_there_is_not_is_refused_when_the_value_is_made() -> None:
    wrong: Any = "int4"
    with pytest.raises(ValueError, match="method='int4' is not known; choose one of gptq, awq"):
        Slimming(wrong)


def test_a_field_is_documented_by_the_string_below_it_also_where_it_is_inherited() -> None:
    assert docs_of(More) == {"method": "By what.", "tasks": "Between how many tasks."}
    assert docs_of(Grid) == {"bits": "Bits of a weight, packed."}
    rows = {f.name: f for f in described(More)}
    assert (rows["method"].type, rows["method"].default, rows["method"].choices) == ("choice", "", ("gptq", "awq"))
    assert (rows["grid"].type, rows["grid"].default) == ("grid or none", "none")
    assert (rows["layers"].type, rows["names"].default) == ("list of int", '["up"]')
