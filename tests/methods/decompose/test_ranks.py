"""Ranks out of a common budget: by the paper's formula, and by singular values."""

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest

from moeflow.methods.allocate import allocate_curves
from moeflow.methods.decompose import ranks
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.decompose.ranks import EPSILON, average_rank, break_even, check_rank, choices


class Spectrum(NamedTuple):
    """One matrix: its shape, the squared error that each lost component adds, and what that counts."""

    rows: int
    columns: int
    energies: Any
    weight: float = 1.0


def allocate(items: Sequence[Sequence[Spectrum]], budget: int, *, whole: bool = True, multiple: int = 1) -> list[tuple[int, ...]]:
    """The ranks of each item within `budget` bytes that cost least; without `whole` no matrix stays as it is."""
    how, several = Decomposition(multiple=multiple), []
    for item in items:
        sides = item[0].rows, item[0].columns
        curve, options = choices([s.energies * s.weight for s in item], 1.0, sides, 2, how)
        several.append((curve, options) if whole else (curve[:-1], options[:-1]))
    chosen = allocate_curves([curve for curve, _ in several], budget)
    return [options[at] for (_, options), at in zip(several, chosen, strict=True)]


def paper_ranks(importance: list[float], average: float, most: int, **how: int) -> list[int]:
    return ranks.paper_ranks(importance, average, most, Decomposition(**how))


def spectra(draw: np.random.Generator, rows: int, columns: int) -> list[tuple[Spectrum, ...]]:
    def one() -> Spectrum:
        return Spectrum(rows, columns, np.sort(draw.exponential(size=min(rows, columns)) ** 3)[::-1], float(draw.uniform(0.1, 2)))

    return [(one(), one()), (one(),)]


def cost_of(item: tuple[Spectrum, ...], chosen: tuple[int, ...]) -> float:
    return sum(s.weight * float(np.sum(s.energies[r:])) for s, r in zip(item, chosen, strict=True) if r)


def bytes_of(item: tuple[Spectrum, ...], chosen: tuple[int, ...]) -> int:
    return sum(2 * (r * (s.rows + s.columns) if r else s.rows * s.columns) for s, r in zip(item, chosen, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_ranks_are_the_best_of_all_within_the_budget(seed: int) -> None:
    """A pair that is whole or factored together, a single one, ranks in multiples, and the jump to a whole matrix."""
    draw = np.random.default_rng(seed)
    items, multiple = spectra(draw, 12, 8), 1 + seed % 2
    legal = [r for r in range(multiple, 5, multiple) if r <= break_even(12, 8)]
    options = [[(0, 0), *product(legal, legal)], [(0,), *((r,) for r in legal)]]
    sums = [(sum(map(bytes_of, items, pick)), sum(map(cost_of, items, pick)), pick) for pick in product(*options)]
    for budget in range(min(s[0] for s in sums), max(s[0] for s in sums) + 40, 16):
        chosen = allocate(items, budget, multiple=multiple)
        assert sum(map(bytes_of, items, chosen)) <= budget
        assert sum(map(cost_of, items, chosen)) == pytest.approx(min(c for b, c, _ in sums if b <= budget), abs=1e-12)


def test_a_rank_budget_is_met_to_the_byte_where_components_divide_it() -> None:
    """Within it, no component that was left out gains more than one that was taken."""
    draw = np.random.default_rng(3)
    items = [item for _ in range(20) for item in spectra(draw, 24, 40)]
    component = 2 * 64
    chosen = allocate(items, 300 * component, whole=False)
    assert sum(map(bytes_of, items, chosen)) == 300 * component
    flat = [(s, r) for item, pick in zip(items, chosen, strict=True) for s, r in zip(item, pick, strict=True)]
    assert all(1 <= r <= break_even(24, 40) for _, r in flat)
    taken = min(s.weight * s.energies[r - 1] for s, r in flat if r > 1)
    assert taken >= max(s.weight * s.energies[r] for s, r in flat if r < 15)
    assert sum(map(bytes_of, items, allocate(items, 300 * component + component - 1, whole=False))) == 300 * component


def test_a_matrix_near_break_even_is_rather_kept_whole() -> None:
    flat, steep = np.ones(16), np.geomspace(1, 1e-9, 16)
    items = [(Spectrum(16, 16, flat),), (Spectrum(16, 16, steep),)]
    assert allocate(items, 2 * (256 + 4 * 32)) == [(0,), (4,)]
    assert allocate(items, 10**6) == [(0,), (0,)]
    with pytest.raises(ValueError, match="a budget of 3 cannot be met; the nearest that can is 128"):
        allocate(items, 3)
    assert allocate(items, 10**6, multiple=16) == [(0,), (0,)]


def test_the_papers_ranks_follow_its_formula_and_sum_to_the_budget() -> None:
    importance = [0.1, 3.0, 100.0, 0.0, 7.5]
    plain = paper_ranks(importance, 512.2, 2048)
    share = (np.array(importance) + EPSILON) ** 0.15
    formula = np.floor(share / share.sum() * 2561).astype(int)
    assert sum(plain) == 2561 and all(0 <= a - b <= 1 for a, b in zip(plain, formula, strict=True))
    clipped = paper_ranks(importance, 512.2, 600, r_min=100, multiple=8)
    assert sum(clipped) == 2560 and all(104 <= r <= 600 and r % 8 == 0 for r in clipped)
    assert sorted(range(5), key=lambda e: (plain[e], importance[e])) == [3, 0, 1, 4, 2]
    assert paper_ranks([2.0] * 3, 16.0, 16) == [16] * 3
    assert sum(paper_ranks([1.0] * 3, 7 / 3, 16)) == 7


def test_ranks_that_cannot_be_had_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="average rank 20 cannot be had with ranks from 1 to 16 .*; the nearest is 16"):
        paper_ranks([1.0] * 3, 20, 16)
    with pytest.raises(ValueError, match="the nearest is 8"):
        paper_ranks([1.0] * 3, 2, 16, r_min=5, multiple=8)
    with pytest.raises(ValueError, match="there is none"):
        paper_ranks([1.0] * 3, 2, 7, r_min=5, multiple=8)
    with pytest.raises(ValueError, match="must be finite"):
        paper_ranks([1.0, float("inf")], 2, 7)


def test_a_rank_above_break_even_is_refused_unless_forced() -> None:
    assert round(break_even(14336, 4096)) == 3186 and average_rank(0.5, 1408, 2048) == pytest.approx(417.18, abs=0.01)
    check_rank(8, 16, 16)
    with pytest.raises(ValueError, match="rank=9 is above 8"):
        check_rank(9, 16, 16)
    check_rank(9, 16, 16, force=True)
    for rank in (0, 17):
        with pytest.raises(ValueError, match="between 1 and 16"):
            check_rank(rank, 16, 16, force=True)
    with pytest.raises(ValueError, match=r"ratio=1.0 of the parameters"):
        average_rank(1.0, 16, 16)
