"""Any curves out of a common budget, exactly."""

from itertools import product

import numpy as np
import pytest

from moeflow.methods.allocate import allocate_curves, exactly


def curves(draw: np.random.Generator, count: int, options: int, unit: int = 1) -> list[list[tuple[int, float]]]:
    """Neither convex nor monotone, some sizes twice."""
    return [[(int(draw.integers(0, 9)) * unit, float(draw.normal())) for _ in range(options)] for _ in range(count)]


def brute(all_curves: list[list[tuple[int, float]]], budget: int, fill: bool = False) -> float | None:
    sums = [(sum(o[0] for o in pick), sum(o[1] for o in pick)) for pick in product(*all_curves)]
    return min((cost for size, cost in sums if (size == budget if fill else size <= budget)), default=None)


def spent(all_curves: list[list[tuple[int, float]]], chosen: list[int]) -> tuple[int, float]:
    picked = [curve[i] for curve, i in zip(all_curves, chosen, strict=True)]
    return sum(size for size, _ in picked), sum(cost for _, cost in picked)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("fill", [False, True])
def test_the_exact_allocation_is_the_best_of_all(seed: int, fill: bool) -> None:
    draw = np.random.default_rng(seed)
    all_curves = curves(draw, count=5, options=4, unit=1 if seed % 2 else 3072)
    for budget in sorted({sum(o[0] for o in pick) for pick in product(*all_curves)}):
        expected = brute(all_curves, budget, fill)
        size, cost = spent(all_curves, allocate_curves(all_curves, budget, fill=fill))
        assert (size == budget if fill else size <= budget) and cost == pytest.approx(expected, abs=1e-12)


def test_a_budget_that_cannot_be_met_names_the_nearest_that_can() -> None:
    all_curves = [[(4, 1.0), (8, 0.0)], [(2, 1.0), (10, 0.0)]]
    with pytest.raises(ValueError, match="a budget of 5 cannot be met; the nearest that can is 6"):
        allocate_curves(all_curves, 5)
    for budget, below in ((13, 10), (99, 18)):
        with pytest.raises(ValueError, match=f"budget of {budget} cannot be met exactly; the nearest below that can is {below}"):
            allocate_curves(all_curves, budget, fill=True)
    assert allocate_curves(all_curves, 99) == [1, 1]
    for broken in ([[(1, float("nan"))]], [[(1.5, 0.0)]], [[(-1, 0.0)]], [[]]):
        with pytest.raises(ValueError, match="curve 0"):
            allocate_curves(broken, 5)


def test_where_the_table_would_be_too_large_the_envelope_comes_close_and_leaves_nothing_that_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = np.random.default_rng(0)
    all_curves = [sorted(c) for c in curves(draw, count=60, options=8)]
    budget = 200
    best = spent(all_curves, allocate_curves(all_curves, budget))[1]
    assert exactly(all_curves, budget)
    monkeypatch.setattr("moeflow.methods.allocate.MAX_CELLS", 10)
    assert not exactly(all_curves, budget)
    chosen = allocate_curves(all_curves, budget)
    size, cost = spent(all_curves, chosen)
    assert size <= budget and best <= cost <= best + 0.01 * abs(best)
    for curve, i in zip(all_curves, chosen, strict=True):
        assert all(o[1] >= curve[i][1] for o in curve if size + o[0] - curve[i][0] <= budget)
    with pytest.raises(ValueError, match="larger unit"):
        allocate_curves(all_curves, budget, fill=True)
