"""The multiple-choice knapsack, solved exactly: one option of each curve, the least cost within a budget. Numbers, no torch.

Layer by layer the sums of sizes and costs are listed of which no other is better in both (Nemhauser and Ullmann, Management
Science 1969), and those go that cannot lead to the optimum: a linear relaxation of the layers to come says how little they can
cost in what is left, and a combination that was found by following the curves' envelopes how much the optimum costs at most.

`moeflow.methods.allocate` has a table over all sizes instead, for curves in a common unit and for budgets that are to be filled;
bytes of files have none.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_SUMS = 1 << 22
"""The most sums that are listed at a time, of some 100 bytes each."""

Floats = NDArray[np.float64]


class Curve:
    """The options (size, cost) of one layer, and their lower convex envelope."""

    def __init__(self, options: ArrayLike) -> None:
        table = np.asarray(options, dtype=np.float64)
        if table.ndim != 2 or table.shape[1] != 2 or not len(table) or not np.isfinite(table).all():
            raise ValueError(f"a curve is a list of finite (size, cost), at least one; this has shape {table.shape}")
        self.size, self.cost = table.T
        order = np.lexsort((self.cost, self.size))
        hull: list[int] = []
        for i in map(int, order):
            if hull and self.cost[i] >= self.cost[hull[-1]]:
                continue
            while len(hull) > 1 and self._turns(hull[-2], hull[-1], i):
                hull.pop()
            hull.append(i)
        self.hull = hull

    def _turns(self, a: int, b: int, c: int) -> bool:
        """Whether `b` lies on or above the line from `a` to `c`."""
        across = (self.cost[b] - self.cost[a]) * (self.size[c] - self.size[a])
        return bool(across >= (self.cost[c] - self.cost[a]) * (self.size[b] - self.size[a]))

    @property
    def steps(self) -> tuple[Floats, Floats]:
        """How much more each segment of the envelope takes, and how much less it costs."""
        return np.diff(self.size[self.hull]), -np.diff(self.cost[self.hull])


class Relaxed:
    """The least cost of several curves at any budget, if an option could be taken in part: a bound from below."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        self.least = sum(float(c.size[c.hull[0]]) for c in curves)
        more, less = (np.concatenate([np.zeros(0), *(c.steps[part] for c in curves)]) for part in (0, 1))
        order = np.argsort(-less / more, kind="stable") if len(more) else np.zeros(0, dtype=np.int64)
        self._sizes = np.concatenate([[0.0], np.cumsum(more[order])]) + self.least
        self._costs = sum(float(c.cost[c.hull[0]]) for c in curves) - np.concatenate([[0.0], np.cumsum(less[order])])

    def cost(self, budget: Floats) -> Floats:
        """Infinite where even the smallest options do not fit."""
        return np.where(budget < self.least, np.inf, np.interp(budget, self._sizes, self._costs))


def cheapest(curves: Sequence[ArrayLike], budget: float) -> list[int]:
    """Choose one option (size, cost) of each curve, so that the sizes sum to at most `budget` and the costs to the least.

    Sizes and costs may be any numbers, costs also negative; sizes that are no whole numbers may exceed the budget by what rounding
    does to their sum. Among equal costs the smaller size wins. Returns the options' indices.
    Raises ValueError with the nearest budget that can be met.
    """
    every = [Curve(c) for c in curves]
    after = [Relaxed(every[i:]) for i in range(len(every) + 1)]
    room = budget + 4 * len(every) * np.spacing(abs(budget))  # sums in another order differ by as much; far less than a byte
    if room < after[0].least:
        raise ValueError(f"a budget of {budget:g} cannot be met; the nearest that can is {after[0].least:g}")
    most = _by_envelopes(every, budget)
    size, cost = np.zeros(1), np.zeros(1)
    came: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # for each sum: which sum before, and which option
    for i, curve in enumerate(every):
        sums = (size[:, None] + curve.size).ravel()
        costs = (cost[:, None] + curve.cost).ravel()
        # the bound is compared with some room for what rounding does to sums in another order
        kept = np.flatnonzero(costs + after[i + 1].cost(room - sums) <= most + 1e-12 * (1 + abs(most)))
        kept = kept[np.lexsort((costs[kept], sums[kept]))]
        before = np.concatenate([[np.inf], np.minimum.accumulate(costs[kept])[:-1]])
        kept = kept[costs[kept] < before]
        if len(kept) > MAX_SUMS:
            raise ValueError(f"the options of {len(every)} layers make more than {MAX_SUMS:,} different sums; offer fewer")
        came.append(np.divmod(kept, len(curve.size)))
        size, cost = sums[kept], costs[kept]
    at, chosen = len(cost) - 1, []  # sizes ascend and costs descend
    for parent, option in reversed(came):
        chosen.append(int(option[at]))
        at = int(parent[at])
    return chosen[::-1]


def least(curves: Sequence[ArrayLike]) -> float:
    """The smallest budget that can be met."""
    return sum(float(np.asarray(c, dtype=np.float64)[:, 0].min()) for c in curves)


def _by_envelopes(curves: Sequence[Curve], budget: float) -> float:
    """The cost of a combination within the budget: the steepest segments of the envelopes first, as long as they fit."""
    left = budget - sum(float(c.size[c.hull[0]]) for c in curves)
    cost = sum(float(c.cost[c.hull[0]]) for c in curves)
    segments = [(less / more, i, more, less) for i, c in enumerate(curves) for more, less in zip(*c.steps, strict=True)]
    full: set[int] = set()
    for _, i, more, less in sorted(segments, reverse=True):  # along one curve they only flatten: none is skipped
        if i not in full and more <= left:
            left, cost = left - more, cost - less
        else:
            full.add(i)
    return float(cost)
