"""Division of a budget between the parts of a model, given what each costs at each size. Numbers, no torch."""

from collections.abc import Sequence
from itertools import pairwise
from math import gcd

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_CELLS = 1 << 26
"""The most cells of the table of an exact allocation: one per curve and reachable size."""
MAX_UPDATES = 1_000_000_000
"""The most updates of the table's cells, which take some seconds."""


def allocate_curves(curves: Sequence[ArrayLike], budget: int, *, fill: bool = False) -> list[int]:
    """Choose one option of each curve, so that sizes sum to at most `budget` and the sum of costs is least: the options' indices.

    A curve is a list of options (size, cost) in any order and of any shape; sizes are integers (experts, parameters or bytes).
    Exact, by dynamic programming over the sizes in their greatest common unit; among equal costs the smaller sum wins. If the table
    would be too large (see `exactly`), it follows the curves' lower convex envelopes instead, and then gives what is left to single
    options while one that costs less still fits. With `fill` the sizes sum to the budget exactly. Raises ValueError with the
    nearest budget that can be met.
    """
    options = [_checked(curve, i) for i, curve in enumerate(curves)]
    least = sum(int(size.min()) for size, _ in options)
    if budget < least:
        raise ValueError(f"a budget of {budget} cannot be met; the nearest that can is {least}")
    unit, cells = _table(options, budget, least)
    if _affordable(options, cells):
        return _by_table(options, budget, least, unit, cells, fill)
    if fill:
        raise ValueError(f"filling a budget of {budget} exactly needs a table that is too large; give sizes in a larger unit")
    return _by_envelope(options, budget)


def exactly(curves: Sequence[ArrayLike], budget: int) -> bool:
    """Whether `allocate_curves` finds the optimum of these curves, rather than follow envelopes because the table is too large."""
    options = [_checked(curve, i) for i, curve in enumerate(curves)]
    return _affordable(options, _table(options, budget, sum(int(size.min()) for size, _ in options))[1])


Options = tuple[NDArray[np.int64], NDArray[np.float64]]


def _checked(curve: ArrayLike, index: int) -> Options:
    table = np.asarray(curve)
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] != 2:
        raise ValueError(f"curve {index} must be a list of (size, cost), at least one; it has shape {table.shape}")
    size, cost = table[:, 0].astype(np.int64), table[:, 1].astype(np.float64)
    if not np.isfinite(table.astype(np.float64)).all() or (size != table[:, 0]).any() or (size < 0).any():
        raise ValueError(f"curve {index} has a size that is no natural number, or a cost that is not finite")
    return size, cost


def _affordable(options: list[Options], cells: int) -> bool:
    return cells * len(options) <= MAX_CELLS and cells * sum(len(size) for size, _ in options) <= MAX_UPDATES


def _table(options: list[Options], budget: int, least: int) -> tuple[int, int]:
    """The common unit of all differences of sizes, and the number of sums of sizes, from the least up, in the table."""
    unit = gcd(*(int(np.gcd.reduce(size - size.min())) for size, _ in options)) or 1
    most = sum(int(size.max()) for size, _ in options)
    return unit, (min(budget, most) - least) // unit + 1


def _by_table(options: list[Options], budget: int, least: int, unit: int, cells: int, fill: bool) -> list[int]:
    best = np.full(cells, np.inf)
    best[0] = 0.0
    came = np.zeros((len(options), cells), dtype=np.min_scalar_type(max(len(size) for size, _ in options)))
    for layer, (size, cost) in enumerate(options):
        steps = (size - size.min()) // unit
        new = np.full(cells, np.inf)
        for i, step in enumerate(steps.tolist()):
            if step < cells:
                tried = best[: cells - step] + cost[i]
                better = tried < new[step:]
                np.copyto(new[step:], tried, where=better)
                np.copyto(came[layer, step:], came.dtype.type(i), where=better)
        best = new
    at = int(np.argmin(best))
    if fill:
        at = int(np.flatnonzero(np.isfinite(best))[-1])
        if least + at * unit != budget:
            raise ValueError(f"a budget of {budget} cannot be met exactly; the nearest below that can is {least + at * unit}")
    chosen = []
    for layer in reversed(range(len(options))):
        size, _ = options[layer]
        i = int(came[layer, at])
        chosen.append(i)
        at -= int(size[i] - size.min()) // unit
    return chosen[::-1]


def _by_envelope(options: list[Options], budget: int) -> list[int]:
    hulls = [_hull(size, cost) for size, cost in options]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(int(options[i][0][o]) for i, o in enumerate(chosen))
    segments = []
    for i, hull in enumerate(hulls):
        size, cost = options[i]
        for a, b in pairwise(hull):
            more = int(size[b] - size[a])
            segments.append(((cost[b] - cost[a]) / more, i, b, more))
    # along one curve the slopes only flatten, so this order never skips one of its points
    full: set[int] = set()
    for _, i, option, more in sorted(segments, key=lambda s: s[0]):
        if i not in full and more <= left:
            chosen[i], left = option, left - more
        else:
            full.add(i)
    return _filled(options, chosen, left)


def _filled(options: list[Options], chosen: list[int], left: int) -> list[int]:
    """Give what is left to single curves, the largest gain first, until no option that costs less fits."""
    start = np.cumsum([0, *(len(size) for size, _ in options[:-1])])
    size, cost = (np.concatenate([o[part] for o in options]) for part in (0, 1))
    of = np.repeat(np.arange(len(options)), [len(s) for s, _ in options])
    now = start + np.asarray(chosen)
    while True:
        gain = np.where(size - size[now][of] <= left, cost[now][of] - cost, 0.0)
        best = int(gain.argmax())
        if gain[best] <= 0:
            return [int(n) for n in now - start]
        left -= int(size[best] - size[now[of[best]]])
        now[of[best]] = best


def _hull(size: NDArray[np.int64], cost: NDArray[np.float64]) -> list[int]:
    """The options on the lower convex envelope, by size, from the smallest to the one that costs least."""
    hull: list[int] = []
    for i in np.lexsort((cost, size)):
        if hull and (cost[i] >= cost[hull[-1]]):
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (cost[b] - cost[a]) * float(size[i] - size[a]) < (cost[i] - cost[a]) * float(size[b] - size[a]):
                break
            hull.pop()
        hull.append(int(i))
    return hull
