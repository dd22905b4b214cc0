"""Budgets and offers as people write them, and what an engine runs together."""

from dataclasses import replace
from itertools import pairwise
from math import inf, nan

import pytest

from moeflow.engines import ENGINES, engine_of
from moeflow.methods.fit.choosing import LISTED, Fitted, Offered, Option, choose, frontier, promising, ranked, smallest, together
from moeflow.methods.fit.options import Alternative, Budget, Offers, size_of
from moeflow.methods.fit.reach import in_reach, most_taken
from moeflow.methods.fit.recovering import with_recovered


@pytest.mark.parametrize(
    "word, size", [("24GB", 24 * 10**9), ("22.5 GiB", int(22.5 * 2**30)), ("100", 100), ("3mb", 3 * 10**6), ("1TiB", 2**40)]
)
def test_sizes_are_read_as_people_write_them(word: str, size: int) -> None:
    assert size_of(word) == size


@pytest.mark.parametrize("word", ["lots", "24 GBs", "-3GB", "", "0GB", "0.2B", "1e3GB"])
def test_what_is_no_size_is_told(word: str) -> None:
    with pytest.raises(ValueError, match="is no size; write it like 24GB"):
        size_of(word)


@pytest.mark.parametrize(
    "given, reason",
    [
        ({}, "give one budget"),
        ({"ratio": 0.25, "bytes": "24GB"}, "give one budget.* given are bytes and ratio"),
        ({"ratio": 1.5}, "between 0 and 1"),
        ({"speed": 0.5}, "a number above 1"),
        ({"speed": float("nan")}, "a number above 1"),
        ({"speed": float("inf")}, "a number above 1"),
        ({"resident": "much"}, "is no size"),
    ],
)
def test_a_budget_that_is_none_is_told(given: dict[str, float | str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Budget(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["counts", "ranks"])
def test_a_part_that_is_none_is_told(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} has 1.5: every part must lie between 0 and 1"):
        Offers(**{field: (0.5, 1.5)})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["bits", "wide"])
def test_bits_that_nothing_packs_are_told(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} has 5: weights are packed in 8, 4, 3, 2 bits"):
        Offers(**{field: (4, 5)})  # type: ignore[arg-type]


def test_a_broken_model_is_no_closer_to_the_original() -> None:
    fitted = Fitted("moeflow", "bytes", 100.0, 90.0, 200.0, 0.1, {0: "8 experts"}, 64, before=0.05)
    assert with_recovered(fitted, {"merged": nan}, 0).recovered == ""
    after = with_recovered(fitted, {"kept": nan, "merged": 0.01}, 0)
    assert (after.recovered, after.before) == ("merged", 0.01)
    assert with_recovered(replace(fitted, before=None), {"merged": inf}, 0).recovered == ""


def test_a_training_is_judged_by_other_text_too() -> None:
    """The choice was made by the calibration's, on which a model that was trained on others looks worse than it is."""
    fitted = Fitted("moeflow", "bytes", 100.0, 90.0, 200.0, 0.1, {0: "8 experts"}, 64, before=0.0020)
    tried = {"merged": 0.0021}
    assert with_recovered(fitted, tried, 0).recovered == ""
    after = with_recovered(fitted, tried, 0, {"": 0.0038, "merged": 0.0020})
    assert (after.recovered, after.before, after.unseen) == ("merged", 0.0021, {"": 0.0038, "merged": 0.0020})
    worse = with_recovered(fitted, {"merged": 0.0060}, 0, {"": 0.0038, "merged": 0.0020})
    assert worse.recovered == "" and worse.before == 0.0020
    assert with_recovered(fitted, {"merged": 0.0010}, 0, {"": 0.0038, "merged": nan}).recovered == ""


def test_a_budget_says_how_much_may_stay() -> None:
    assert Budget(ratio=0.25).most(400) == 300
    assert Budget(speed=2).most(400) == 200 and Budget(speed=2).unit == "operations"
    assert Budget(resident="1KB").most(400) == 1000 and Budget(resident="1KB").unit == "resident"


def offer(*layers: dict[Alternative, tuple[float, float]]) -> Offered:
    return {i: {a.name: Option(a, *values) for a, values in layer.items()} for i, layer in enumerate(layers)}


WHOLE, SIX, FOUR_BITS, THREE_BITS, GONE = (
    Alternative(8), Alternative(6), Alternative(8, bits=4), Alternative(8, bits=3), Alternative(0),
)  # fmt: skip


def test_layers_are_packed_alike_where_the_engine_loads_nothing_else() -> None:
    layer = {WHOLE: (80.0, 0.0), FOUR_BITS: (20.0, 0.1), THREE_BITS: (15.0, 0.3), GONE: (0.0, 9.0)}
    alike, mixed = replace(ENGINES["moeflow"], mixed=False), ENGINES["moeflow"]
    for subset in together(offer(layer, layer), alike):
        bits = {o.what.bits for options in subset.values() for o in options.values() if o.what.keep}
        assert len(bits) == 1
    assert set(choose(offer(layer, layer), alike, 100.0).values()) == {FOUR_BITS.name}
    assert set(choose(offer(layer, layer), mixed, 100.0).values()) == {WHOLE.name, FOUR_BITS.name}
    assert set(choose(offer(layer, layer), mixed, 35.0).values()) == {FOUR_BITS.name, THREE_BITS.name}
    assert not ENGINES["transformers"].mixed
    with pytest.raises(ValueError, match="^nothing .* takes 10.0 KiB or less; the nearest that can be had is 30.0 KiB$"):
        choose(offer({WHOLE: (20_480.0, 0.0)}), ENGINES["moeflow"], 0.0, 10_240.0, "bytes")


def test_what_is_measured_again_is_what_costs_least_at_the_price_of_the_choice() -> None:
    """The chosen one first, then its neighbours on the curve; what costs more than a larger one comes last."""
    sizes = range(10, 110, 5)
    layer = {Alternative(n): (float(n), (110 - n) ** 2 / 1e4 + (1.0 if n % 10 else 0.0)) for n in sizes}
    chosen = choose(offer(layer, layer), ENGINES["moeflow"], 120.0)
    listed = promising(offer(layer, layer), ENGINES["moeflow"], chosen)
    for i, names in listed.items():
        assert len(names) == LISTED and names[0] == chosen[i]
        assert {*names[:4]} == {Alternative(n).name for n in (50, 60, 70, 80)}
        assert not any(Alternative(n).name in names[:10] for n in sizes if n % 10), "those off the curve cost more at any price"


def test_transformers_gets_one_number_of_experts() -> None:
    first, second = {WHOLE: (80.0, 0.0), SIX: (60.0, 0.1)}, {WHOLE: (80.0, 0.0), SIX: (60.0, 0.5)}
    assert choose(offer(first, second), ENGINES["moeflow"], 140.0) == {0: SIX.name, 1: WHOLE.name}
    assert choose(offer(first, second), ENGINES["transformers"], 140.0) == {0: SIX.name, 1: SIX.name}


def test_models_of_one_kind_are_ranked_by_what_they_cost() -> None:
    layer = {WHOLE: (80.0, 0.0), SIX: (60.0, 0.1), FOUR_BITS: (20.0, 0.05), replace(SIX, bits=4): (15.0, 0.2)}
    found = ranked(offer(layer, layer), ENGINES["transformers"], 140.0)
    assert found == [{0: a.name, 1: a.name} for a in (FOUR_BITS, SIX, replace(SIX, bits=4))]
    assert ranked(offer(layer, layer), ENGINES["moeflow"], 140.0) == [{0: FOUR_BITS.name, 1: WHOLE.name}]


def test_what_can_be_had_is_rounded_so_that_it_can_be_asked_for() -> None:
    layer = [WHOLE, FOUR_BITS]
    sizes, whole = [[80_050.0, 20_050.0]], 100_050
    (reach,) = in_reach(Budget(bytes="39.2KiB"), 40_050, whole, whole, {"0": layer}, sizes)
    assert reach == "a budget in bytes can be from 39.2 KiB to 97.7 KiB: fewer bits 39.2 KiB"
    _, below = in_reach(Budget(bytes="39.1KiB"), 40_050, whole, whole, {"0": layer}, sizes)
    assert below == "39.1 KiB is below that, as far as is known before layers are made; it is tried"
    with pytest.raises(ValueError, match="takes 39.1 KiB or less; the nearest that can be had is 39.2 KiB"):
        choose(offer({FOUR_BITS: (20_050.0, 0.1)}), ENGINES["moeflow"], 20_000.0, 20_000.0, "bytes")
    with pytest.raises(ValueError, match="takes 39.2 KiB or less; the nearest that can be had is 40,101 bytes"):
        choose(offer({FOUR_BITS: (20_100.5, 0.1)}), ENGINES["moeflow"], 20_100.0, 20_000.0, "bytes")


def test_a_model_does_not_fit_as_it_is_where_the_engine_does_not_run_it() -> None:
    layer, sizes, whole = [WHOLE, SIX], [[80.0, 60.0]], 100
    for engine, most in {"vllm": 100, "vllm,ep=3": 80}.items():
        assert most_taken(engine_of(engine), {"0": layer}, sizes, whole) == most
        notes = in_reach(Budget(bytes="1KB"), 80, most, whole, {"0": layer}, sizes)
        assert f"to {most} bytes" in notes[0] and ("the model fits into this budget as it is" in notes) == (most == whole)


def test_a_budget_that_nothing_reaches_names_the_nearest_that_something_does() -> None:
    layer = {WHOLE: (80.0, 0.0), SIX: (60.0, 0.1)}
    with pytest.raises(ValueError, match="takes 100 or less; the nearest that can be had is 120"):
        choose(offer(layer, layer), ENGINES["moeflow"], 100.0)


def test_the_frontier_falls_from_the_smallest_to_the_whole() -> None:
    layer = {WHOLE: (80.0, 0.0), SIX: (60.0, 0.1), FOUR_BITS: (20.0, 0.2), GONE: (0.0, 9.0)}
    points = frontier(offer(layer, layer), ENGINES["moeflow"], rest=10.0)
    assert points[0].size == 30.0 and points[-1].cost == 0.0, "one of both layers keeps experts"
    assert all(a.cost > b.cost and a.size < b.size for a, b in pairwise(points))


def test_some_layer_keeps_experts_whatever_the_budget() -> None:
    """Of all layers that could be gone, the one that is kept is where it costs least, as trying all combinations finds."""
    first, second = {WHOLE: (80.0, 0.0), FOUR_BITS: (20.0, 0.2), GONE: (0.0, 0.3)}, {WHOLE: (50.0, 0.0), GONE: (0.0, 0.4)}
    both, engine = offer(first, second), ENGINES["moeflow"]
    for room in (*range(20, 140, 5), 20.0, 50.0):
        fitting = [
            (a.cost + b.cost, a.size + b.size, {0: n, 1: m})
            for n, a in both[0].items()
            for m, b in both[1].items()
            if a.size + b.size <= room and (a.what.keep or b.what.keep)
        ]
        assert choose(both, engine, room) == min(fitting, key=lambda f: f[:2])[2]
    with pytest.raises(ValueError, match="takes 19 or less; the nearest that can be had is 20"):
        choose(both, engine, 19.0)
    with pytest.raises(ValueError, match="nothing that was offered"):
        choose(offer({GONE: (0.0, 0.3)}), engine, 100.0)
    assert smallest(both, engine) == 20.0
