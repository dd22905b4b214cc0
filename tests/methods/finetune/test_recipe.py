"""A recipe as a person sets it, and as the step gets it."""

from dataclasses import replace
from typing import Any

import pytest

from moeflow.methods.finetune.recipe import CODES, Gang, Recipe
from moeflow.options import described
from moeflow.run import pipeline
from moeflow.step import Context, Spec, Step, step

FIXED: dict[str, Any] = {"rows": 640, "dtype": "float32", "sparse": False, "validated": True}


@step("test.planned", version=1, spec=lambda *, how, gang: Spec((how, gang)))
def planned(context: Context, *, how: Recipe | None, gang: Gang) -> None:
    """A step that is only planned."""


def build(*, tune: Recipe | None = Recipe(epochs=2), gang: Gang = Gang(zero=3)) -> Step:
    return planned(how=tune, gang=gang)


def test_a_person_sets_fields_and_the_step_gets_the_values() -> None:
    words = [
        "tune.rate=1e-3",
        'tune.targets=["attention"]',
        "tune.betas=[0.9, 0.95]",
        "gang.processes=8",
        "gang.device_memory=80e9",
    ]
    how, gang = pipeline.call(build, [*words, "gang.zero=1", 'gang.deepspeed={"steps_per_print": 10}']).spec.output
    assert how == Recipe(epochs=2, rate=1e-3, targets=("attention",), betas=(0.9, 0.95))
    assert gang == Gang(8, zero=1, device_memory=80e9, deepspeed={"steps_per_print": 10})
    assert pipeline.call(build, ["tune=none"]).spec.output[0] is None
    with pytest.raises(ValueError, match="did you mean 'epochs'"):
        pipeline.call(build, ["tune.epoch=3"])


def test_every_field_is_explained() -> None:
    assert all(field.help and field.help.endswith(".") for kind in (Recipe, Gang) for field in described(kind))


def test_what_is_left_open_is_settled_once() -> None:
    settled = Recipe(epochs=1.5, batch=64, warmup=0.1, every=15, targets=("experts", "attention")).settled(**FIXED)
    assert (settled.steps, settled.warm_steps, settled.every, settled.dtype, settled.keep_zeros) == (15, 2, 0, "float32", False)
    assert settled.targets == ("attention", "experts") and settled.scale == 2
    assert settled.settled(**FIXED) == settled, "and stays as it is"
    assert replace(settled, every=5).settled(**FIXED | {"validated": False}) == replace(settled, keep="last")


def test_codes_are_trained_by_themselves_where_there_are_few() -> None:
    auto = Recipe(packed="auto")
    assert [auto.settled(**FIXED, packed=n).packed for n in (1, CODES, CODES + 1)] == ["codes", "codes", "scales"]
    assert auto.settled(**FIXED, packed=CODES) == Recipe(packed="codes").settled(**FIXED, packed=CODES), "one training has one key"
    assert auto.settled(**FIXED) == Recipe().settled(**FIXED), "where nothing is packed it says nothing"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"epochs": 2}, {"steps": 20}),
        ({"rank": 8}, {"rank": 8, "alpha": 16}),
        ({"mode": "full", "rank": 3, "targets": ("router",)}, {"mode": "full", "alpha": 1.0}),
        ({"loss": "kl", "mix": 0.1}, {"loss": "kl"}),
        ({"top": 8}, {}),
        ({"warmup": 0.12}, {"warmup": 0.1}),
    ],
    ids=lambda change: " ".join(map(str, change)) or "default",
)
def test_two_spellings_of_one_training_are_settled_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert Recipe(**one).settled(**FIXED) == Recipe(**other).settled(**FIXED)
