"""Intervals hold what they promise: 95 % of them contain the truth, and few items that differ leave them wide."""

import numpy as np
import pytest

from moeflow.methods.judge import intervals


def covered(draw: object, of: object, truth: float) -> float:
    """The part of 400 intervals that contain the truth."""
    random = np.random.default_rng(0)
    held = [low <= truth <= high for low, high in (of(*draw(random)) for _ in range(400))]
    return float(np.mean(held))


@pytest.mark.parametrize("items", [10, 40])
def test_nineteen_of_twenty_intervals_contain_the_truth(items: int) -> None:
    def pairs(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        first = random.random(items) < 0.8
        return first.astype(float), np.where(random.random(items) < 0.1, ~first, first).astype(float)

    binary = covered(lambda r: [(r.random(items) < 0.7).astype(float)], intervals.of_mean, 0.7)
    lengths = covered(lambda r: [r.normal(5, 2, items)], intervals.of_mean, 5.0)
    paired = covered(pairs, intervals.of_change, 0.1 * (1 - 2 * 0.8))
    changes = covered(lambda r: [r.normal(0, 9, items), r.normal(1, 9, items)], intervals.of_change, 1.0)
    assert min(binary, lengths, paired, changes) > 0.92


def test_items_that_all_agree_prove_nothing_more_than_their_number() -> None:
    low, high = intervals.of_change([1, 1, 0, 1], [1, 1, 0, 1])
    assert low < -0.3 and high > 0.3
    narrow = intervals.of_change([1.0] * 400, [1.0] * 400)
    assert -0.02 < narrow[0] < 0 < narrow[1] < 0.02
    assert intervals.of_mean([1.0]) is None and intervals.of_change([1.0], [0.0]) is None


def test_students_quantiles_are_those_of_the_tables() -> None:
    for freedom, quantile in ((1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042)):
        values = np.r_[np.zeros(freedom), 1.0]
        low, high = intervals.of_mean(values * 2)
        spread = (high - low) / 2 / ((values * 2).std(ddof=1) / np.sqrt(len(values)))
        assert spread == pytest.approx(quantile, rel=0.02)


def test_a_figure_that_is_no_mean_is_drawn_again_item_by_item() -> None:
    random = np.random.default_rng(0)
    first, second = random.random(200), random.random(200) + 0.5
    (low, high), (less, more) = intervals.resampled(list(first), list(second), lambda v: float(np.exp(np.mean(v))))
    assert low < np.exp(second.mean()) < high and less < np.exp(second.mean()) - np.exp(first.mean()) < more and less > 0
