"""The multiple-choice knapsack: against all combinations, and on curves as large as a model's."""

from itertools import product

import numpy as np
import pytest

from moeflow.methods.fit.knapsack import Curve, Relaxed, cheapest, least


@pytest.mark.parametrize("seed", range(40))
def test_what_is_chosen_is_the_best_of_all_combinations(seed: int) -> None:
    draw = np.random.default_rng(seed)
    curves = [np.stack([draw.integers(0, 30, n), draw.normal(size=n)], 1) for n in draw.integers(1, 6, draw.integers(1, 5))]
    budget = float(draw.integers(0, 90))
    sums = [np.sum(chosen, 0) for chosen in product(*curves)]
    best = min((s for s in sums if s[0] <= budget), key=lambda s: s[1], default=None)
    if best is None:
        with pytest.raises(ValueError, match=f"the nearest that can is {least(curves):g}"):
            cheapest(curves, budget)
        return
    size, cost = np.sum([curve[i] for curve, i in zip(curves, cheapest(curves, budget), strict=True)], 0)
    assert size <= budget and cost == pytest.approx(best[1])


@pytest.mark.parametrize("seed", range(60))
def test_sizes_that_are_no_whole_numbers_fit_to_the_last_bit(seed: int) -> None:
    """Operations are: of so many experts a token takes some. Their sum depends on the order that it is taken in."""
    draw = np.random.default_rng(seed)
    curves = [np.stack([draw.integers(10**6, 10**9, 3) / 30, draw.random(3)], 1) for _ in range(draw.integers(3, 30))]
    picked = cheapest(curves, least(curves))
    assert picked == [int(np.argmin(curve[:, 0])) for curve in curves]
    chosen = draw.integers(0, 3, len(curves))
    budget = sum(float(curve[i, 0]) for curve, i in zip(curves, chosen, strict=True))
    size, cost = np.sum([curve[i] for curve, i in zip(curves, cheapest(curves, budget), strict=True)], 0)
    assert size <= budget * (1 + 1e-14) and cost <= sum(curve[i, 1] for curve, i in zip(curves, chosen, strict=True)) + 1e-9


def test_among_equal_costs_the_smaller_wins() -> None:
    assert cheapest([[(5, 1.0), (3, 1.0), (9, 1.0)], [(2, 0.0)]], 100) == [1, 0]


@pytest.mark.parametrize("part", [0.3, 0.6])
def test_curves_of_a_large_model_are_solved_to_the_optimum(part: float) -> None:
    """The cost cannot be below what a relaxation allows, and is above it by less than one option's cost."""
    draw = np.random.default_rng(0)
    sizes = np.sort(draw.integers(5 * 10**8, 3 * 10**9, (48, 30)))
    costs = np.exp(-sizes / 6e8) * draw.uniform(0.1, 3, (48, 1)) * np.exp(draw.normal(0, 0.3, sizes.shape))
    curves = [np.stack(pair, 1) for pair in zip(sizes, costs, strict=True)]
    budget = float(sizes[:, -1].sum() * part)
    picked = [curve[i] for curve, i in zip(curves, cheapest(curves, budget), strict=True)]
    size, cost = np.sum(picked, 0)
    bound = float(Relaxed([Curve(c) for c in curves]).cost(np.array(budget)))
    assert size <= budget and bound <= cost + 1e-9
    assert cost - bound < 0.01 * cost


@pytest.mark.parametrize("curve", [[], [(1, 2, 3)], [(1, float("nan"))]])
def test_what_is_no_curve_is_refused(curve: list[tuple[float, ...]]) -> None:
    with pytest.raises(ValueError, match="a curve is a list of finite"):
        cheapest([curve], 10)
