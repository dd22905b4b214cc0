"""Which rank each matrix gets, and, more generally, what each part of a model gets out of a common budget. Numbers, no torch.

A rank of 0 means that a matrix is kept whole, as in a checkpoint's format. Sizes are bytes unless said otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import floor, gcd, isfinite
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_CELLS = 1 << 26
"""The most cells of the table of an exact allocation: one per curve and reachable size."""
MAX_UPDATES = 1_000_000_000
"""The most updates of its cells: some seconds."""

POLICIES = ("vanilla", "keep")


def break_even(rows: int, columns: int) -> float:
    """The rank at which two factors of a matrix are as large as the matrix: above it nothing is saved."""
    return rows * columns / (rows + columns)


def average_rank(ratio: float, rows: int, columns: int) -> float:
    """The rank that removes this part of a matrix's parameters, between 0 and 1 (Yang et al., MoE-I2, EMNLP Findings 2024)."""
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} of the parameters cannot be removed; give a number from 0 to below 1")
    return (1 - ratio) * break_even(rows, columns)


def check_rank(rank: int, rows: int, columns: int, *, force: bool = False) -> None:
    """Raise ValueError where a matrix cannot have this rank or, unless forced, where its factors would be larger than itself."""
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(
            f"rank={rank} must lie between 1 and {min(rows, columns)}, the smaller side of a [{rows}, {columns}] matrix"
        )
    if rank * (rows + columns) > rows * columns and not force:
        raise ValueError(
            f"rank={rank} is above {break_even(rows, columns):.6g}, where the factors of a [{rows}, {columns}] matrix are as "
            "large as itself; keep the matrix whole or force it"
        )


def treatment(tokens: Sequence[int], least: int, policy: str = "vanilla") -> list[str]:
    """What happens to each expert: "whitened" where it saw at least `least` tokens and one at all, else what `policy` says.

    "vanilla": its matrices are decomposed without statistics; "keep": they stay whole.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} for experts with few tokens must be one of {', '.join(POLICIES)}")
    return ["whitened" if seen >= max(least, 1) else policy for seen in tokens]


def paper_ranks(
    importance: Sequence[float],
    average: float,
    *,
    alpha: float = 0.15,
    epsilon: float = 1e-12,
    r_min: int = 1,
    r_max: int,
    multiple: int = 1,
) -> list[int]:
    """The ranks of a layer's experts by importance I: (I + epsilon)^alpha over its sum, times the sum of ranks (MoE-I2, 2024).

    They sum to `average` times the number of experts, rounded down to the multiple, exactly: what clipping to [r_min, r_max]
    takes or gives is shared by the others in proportion, and what rounding down leaves goes to the largest remainders. An
    importance below zero counts as zero. Raises ValueError where the sum cannot be reached.
    """
    if not all(isfinite(i) for i in importance):
        raise ValueError(f"importance {list(importance)} must be finite; the calibration overflowed")
    if multiple < 1 or r_min < 1 or epsilon <= 0:
        raise ValueError(f"r_min={r_min} and multiple={multiple} must be at least 1, and epsilon={epsilon} above 0")
    low, high, count = -(-r_min // multiple), r_max // multiple, len(importance)
    # a ratio that divides must not lose its last rank to rounding
    total = floor(Fraction(average).limit_denominator(10**9) * count / multiple)
    if not low * count <= total <= high * count or low > high:
        nearest = min(max(total, low * count), high * count) / count * multiple
        way_out = f"the nearest is {nearest:.6g}" if low <= high else "there is none"
        raise ValueError(
            f"average rank {average:.6g} cannot be had with ranks from {r_min} to {r_max} in multiples of {multiple}; {way_out}"
        )
    share = (np.maximum(np.asarray(importance, dtype=np.float64), 0.0) + epsilon) ** alpha
    exact = _clipped_shares(share, total, low, high)
    ranks = np.floor(exact + 1e-9).astype(int)
    order = sorted(range(count), key=lambda e: (ranks[e] - exact[e], e))
    for e in [e for e in order if ranks[e] < high][: total - int(ranks.sum())]:
        ranks[e] += 1
    return [int(r) * multiple for r in ranks]


@dataclass(frozen=True)
class Spectrum:
    """One matrix that may be cut: its shape, the squared error that each component's loss adds, descending, and its weight."""

    rows: int
    columns: int
    energies: ArrayLike
    weight: float = 1.0


def allocate(items: Sequence[Sequence[Spectrum]], budget: int, **limits: Any) -> list[tuple[int, ...]]:
    """The ranks under which the weighted sum of squared errors is least and all matrices together take at most `budget` bytes.

    An item is one matrix, or several of one shape that are all whole or all factored, as gate and up of an expert are. Within
    an item components go by their gain; among items, and between an item's best rank and keeping it whole (which costs no error
    and jumps in bytes), the choice is that of `allocate_curves`. `limits` are those of `choices`. Raises ValueError where the
    budget is too small, with the smallest that can be met.
    """
    curves, ranks = choices(items, **limits)
    return [ranks[at][option] for at, option in enumerate(allocate_curves(curves, budget))]


def choices(
    items: Sequence[Sequence[Spectrum]],
    *,
    itemsize: int = 2,
    multiple: int = 1,
    r_min: int = 1,
    r_max: int | None = None,
    whole: bool = True,
    force: bool = False,
) -> tuple[list[NDArray[np.float64]], list[list[tuple[int, ...]]]]:
    """What `allocate` chooses from: of each item the curve of its options (bytes, weighted error), and the ranks behind each.

    Ranks are multiples of `multiple` from r_min to r_max, and at most break-even unless forced; `itemsize` is the bytes of a
    weight; `whole` lets an item stay as it is. Raises ValueError where nothing is left to choose.
    """
    if multiple < 1 or r_min < 1:
        raise ValueError(f"r_min={r_min} and multiple={multiple} must be at least 1")
    built = [_item(spectra, itemsize, multiple, r_min, r_max, whole, force) for spectra in items]
    return [curve for curve, _ in built], [ranks for _, ranks in built]


def allocate_curves(curves: Sequence[ArrayLike], budget: int, *, fill: bool = False) -> list[int]:
    """One option of each curve, so that the sum of sizes is at most `budget` and the sum of costs least: the options' indices.

    A curve is its options (size, cost) in any order and of any shape; sizes are integers (experts, parameters or bytes). Exact,
    by dynamic programming over the sizes in their greatest common unit, equal costs going to the smaller sum. Only where that
    table would be too large (`exactly` says so) along the curves' lower convex envelopes; what that leaves is given to single
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
    """Whether `allocate_curves` finds the optimum of these curves, or goes along their envelopes since the table is too large."""
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
    """The common unit of all differences of sizes, and how many sums of sizes from the least up are to be looked at."""
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
    # along one curve the slopes only flatten, so that this order never jumps over a point of it
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


def _clipped_shares(share: NDArray[np.float64], total: int, low: int, high: int) -> NDArray[np.float64]:
    """`total` in proportion to the shares where that lies between `low` and `high`, found by bisection on the factor."""
    below, above = 0.0, high / float(share.min())
    for _ in range(200):
        factor = (below + above) / 2
        below, above = (factor, above) if np.clip(share * factor, low, high).sum() < total else (below, factor)
    return np.clip(share * above, low, high)


def _item(
    spectra: Sequence[Spectrum], itemsize: int, multiple: int, r_min: int, r_max: int | None, whole: bool, force: bool
) -> tuple[NDArray[np.float64], list[tuple[int, ...]]]:
    """The curve of an item's options and the ranks behind each."""
    rows, columns = spectra[0].rows, spectra[0].columns
    if any((s.rows, s.columns) != (rows, columns) for s in spectra):
        raise ValueError(f"matrices {[(s.rows, s.columns) for s in spectra]} of one item must have one shape; give them apart")
    smaller = min(rows, columns)
    top = min(smaller, smaller if r_max is None else r_max, smaller if force else rows * columns // (rows + columns))
    low, high = -(-r_min // multiple), top // multiple
    energies = []
    for s in spectra:
        energy = np.asarray(s.energies, dtype=np.float64)
        if energy.shape != (smaller,) or not np.isfinite(energy).all() or (energy < 0).any() or s.weight < 0:
            raise ValueError(f"a [{rows}, {columns}] matrix needs {smaller} finite energies and a weight, none negative")
        energies.append(np.sort(energy)[::-1] * s.weight)
    sizes: list[int] = []
    costs: list[float] = []
    ranks: list[tuple[int, ...]] = []
    if low <= high:
        # error left after each number of blocks of components; a block never gains more than the one before it
        tails = [np.append(np.cumsum(e[::-1])[::-1], 0.0)[: high * multiple + 1 : multiple] for e in energies]
        gains = sorted((-(t[b] - t[b + 1]), k, b) for k, t in enumerate(tails) for b in range(low, high))
        now = [low] * len(spectra)
        cost, block = sum(float(t[low]) for t in tails), multiple * (rows + columns) * itemsize
        for gain, k, _ in [(0.0, -1, 0), *gains]:
            if k >= 0:
                now[k] += 1
                cost += gain
            sizes.append(sum(now) * block)
            costs.append(max(cost, 0.0))
            ranks.append(tuple(n * multiple for n in now))
    if whole:
        sizes.append(rows * columns * itemsize * len(spectra))
        costs.append(0.0)
        ranks.append((0,) * len(spectra))
    if not ranks:
        raise ValueError(
            f"no rank from {r_min} to {top} is a multiple of {multiple}; lower the multiple or let matrices stay whole"
        )
    return np.column_stack([np.asarray(sizes, dtype=np.float64), costs]), ranks
