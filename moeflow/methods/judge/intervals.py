"""Intervals of 95 % for a mean over the items of a task, and for the change of that mean between two models, item by item.

Shapes are suffixes: I items.
"""

from collections.abc import Callable, Sequence
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np

Z = NormalDist().inv_cdf(0.975)
RESAMPLES = 1000
Interval = tuple[float, float]
Aggregate = Callable[[Sequence[Any]], float]
"""How a figure is made of its items' values, where it is not their mean."""


def of_mean(values_I: Sequence[float]) -> Interval | None:
    """The interval of a mean: Wilson's where every value is 0 or 1, else Student's. None for fewer than two items."""
    v_I = np.asarray(values_I, float)
    if len(v_I) < 2:
        return None
    if _binary(v_I):
        return _wilson(float(v_I.mean()), len(v_I))
    return _student(v_I)


def of_change(first_I: Sequence[float], second_I: Sequence[float]) -> Interval | None:
    """The interval of the mean of `second` minus `first`, of the same items in the same order. None for fewer than two items.

    Where every value is 0 or 1 it is Bonett and Price's for paired proportions (Statistics in Medicine 2012), which stays wide
    where few items differ; else Student's for the differences.
    """
    a_I, b_I = np.asarray(first_I, float), np.asarray(second_I, float)
    if len(a_I) < 2:
        return None
    if not (_binary(a_I) and _binary(b_I)):
        return _student(b_I - a_I)
    won, lost = ((b_I > a_I).sum() + 1) / (len(a_I) + 2), ((b_I < a_I).sum() + 1) / (len(a_I) + 2)
    half = Z * sqrt((won + lost - (won - lost) ** 2) / (len(a_I) + 2))
    return max(-1.0, float(won - lost - half)), min(1.0, float(won - lost + half))


def resampled(first: Sequence[Any], second: Sequence[Any], aggregate: Aggregate, seed: int = 0) -> tuple[Interval, Interval]:
    """The intervals of the second's figure and of its change, of the same items, by resampling items: 1,000 times, paired."""
    random = np.random.default_rng(seed)
    figures, changes = [], []
    for _ in range(RESAMPLES):
        picked = random.integers(0, len(second), len(second))
        before, after = (aggregate([values[i] for i in picked]) for values in (first, second))
        figures.append(after)
        changes.append(after - before)
    low, high = np.quantile(figures, (0.025, 0.975)), np.quantile(changes, (0.025, 0.975))
    return (float(low[0]), float(low[1])), (float(high[0]), float(high[1]))


def _binary(values_I: np.ndarray) -> bool:
    return bool(np.isin(values_I, (0.0, 1.0)).all())


def _wilson(part: float, n: int) -> Interval:
    middle, half = part + Z**2 / (2 * n), Z * sqrt(part * (1 - part) / n + Z**2 / (4 * n**2))
    return max(0.0, (middle - half) / (1 + Z**2 / n)), min(1.0, (middle + half) / (1 + Z**2 / n))


def _student(values_I: np.ndarray) -> Interval:
    mean, half = float(values_I.mean()), _t(len(values_I) - 1) * float(values_I.std(ddof=1)) / sqrt(len(values_I))
    return mean - half, mean + half


def _t(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution, by its expansion (Abramowitz and Stegun 26.7.5); exact for 1 and 2."""
    if freedom <= 2:
        return (12.7062047, 4.3026527)[freedom - 1]
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    )
    return Z + sum(term / freedom**power for power, term in enumerate(terms, 1))
