"""The rank of each matrix, by MoE-I2's formula or by what costs least within a common budget. Numbers, no torch.

Rank 0 means that a matrix stays whole, as in a checkpoint's format. Sizes are bytes unless said otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor, isfinite
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import load_file, save_file

from moeflow.arch import MATRICES
from moeflow.methods.allocate import allocate_curves, exactly
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.rare import treatments
from moeflow.methods.records import Importance, Ranks
from moeflow.step import Artifact

PARTS = {"gate_up": ("gate", "up"), "down": ("down",)}
"""The parts of an expert whose matrices are whole or factored together, and measured together."""


def break_even(rows: int, columns: int) -> float:
    """The rank at which a matrix's two factors are as large as the matrix; above it nothing is saved."""
    return rows * columns / (rows + columns)


def average_rank(ratio: float, rows: int, columns: int) -> float:
    """The rank that removes this part, 0 to below 1, of a matrix's parameters (Yang et al., MoE-I2, EMNLP Findings 2024)."""
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} of the parameters cannot be removed; give a number from 0 to below 1")
    return (1 - ratio) * break_even(rows, columns)


def check_rank(rank: int, rows: int, columns: int, *, force: bool = False) -> None:
    """Raise ValueError if a matrix cannot have this rank or, unless forced, if its factors would be larger than itself."""
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(
            f"rank={rank} must lie between 1 and {min(rows, columns)}, the smaller side of a [{rows}, {columns}] matrix"
        )
    if rank * (rows + columns) > rows * columns and not force:
        raise ValueError(
            f"rank={rank} is above {break_even(rows, columns):.6g}, where the factors of a [{rows}, {columns}] matrix are as "
            "large as itself; keep the matrix whole or force it"
        )


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

    The ranks sum exactly to `average` times the number of experts, rounded down to the multiple. The experts that are not clipped
    to [r_min, r_max] share in proportion what clipping takes or gives; what rounding down leaves goes to the largest remainders. A
    negative importance counts as zero. Raises ValueError if the sum cannot be reached.
    """
    if not all(isfinite(i) for i in importance):
        raise ValueError(f"importance {list(importance)} must be finite; the calibration overflowed")
    if multiple < 1 or r_min < 1 or epsilon <= 0:
        raise ValueError(f"r_min={r_min} and multiple={multiple} must be at least 1, and epsilon={epsilon} above 0")
    low, high, count = -(-r_min // multiple), r_max // multiple, len(importance)
    # an average that is a simple fraction must not lose a rank to rounding
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


def moved_rank(rows: int, columns: int) -> int:
    """The rank to which a layer is cut to measure how far the model's predictions move: two thirds of break-even."""
    return max(1, int(break_even(rows, columns) * 2 / 3))


def most_rank(r_max: int, rows: int, columns: int) -> int:
    """The largest rank that saves anything, or `r_max` if that is smaller."""
    even = int(break_even(rows, columns))
    return min(r_max, even) if r_max else even


def fewest_parameters(rows: int, columns: int, how: Decomposition) -> int:
    """The number of parameters of a matrix at its smallest allowed rank."""
    return min(-(-how.r_min // how.multiple) * how.multiple * (rows + columns), rows * columns)


def layer_ranks(of_layer: Importance, sides: tuple[int, int], how: Decomposition) -> list[int]:
    """The ranks of a layer's experts by MoE-I²'s formula, one for all three matrices of an expert; 0: the expert stays whole.

    `sides`: (expert width F, model width D). If experts stay whole, the layer's others get lower ranks to make up for them. Raises
    ValueError if that is not possible.
    """
    even = break_even(*sides)
    whole = [t == "keep" for t in treatments(of_layer.tokens, how.least, how.rare, method="paper", by_weights="paper")]
    cut = [v for v, w in zip(of_layer.importance, whole, strict=True) if not w]
    left = average_rank(how.ratio, *sides) * len(whole) - even * sum(whole)
    if left < how.r_min * len(cut):
        nearest = 1 - (even * sum(whole) + how.r_min * len(cut)) / (even * len(whole))
        raise ValueError(
            f"{sum(whole)} of the {len(whole)} experts of layer {of_layer.layer} saw fewer than {how.least} tokens and stay whole: "
            f"the others cannot make up for ratio={how.ratio}; the nearest is {nearest:.4f}, or calibrate on more tokens"
        )
    average, r_max = left / max(1, len(cut)), most_rank(how.r_max, *sides)
    ranks = iter(
        paper_ranks(cut, average, alpha=how.alpha, r_min=how.r_min, r_max=r_max, multiple=how.multiple) if cut else ()
    )  # fmt: skip
    return [0 if w else next(ranks) for w in whole]


@dataclass(frozen=True)
class Spectra:
    """How much each component of a layer's matrices adds to the expert's outputs on its routed tokens."""

    FILE: ClassVar[str] = "spectra.safetensors"

    energies: dict[str, NDArray[np.float64]]
    """Per matrix, squared and descending: [E, K], K the smaller side."""
    tokens_E: NDArray[np.int64]
    """The number of recorded tokens that reach each expert."""
    whole_E: NDArray[np.int64]
    """1 for an expert that stays whole because too few tokens reach it."""
    sides: tuple[int, int]
    """The expert width F and the model width D."""
    itemsize: int
    """Bytes per weight."""

    def write(self, folder: Path) -> None:
        numbers = {"sides": np.array(self.sides), "itemsize": np.array(self.itemsize)}
        each = {f"{m}_EK": energy for m, energy in self.energies.items()}
        tensors = {**each, "tokens_E": self.tokens_E, "whole_E": self.whole_E, **numbers}
        save_file(tensors, folder / self.FILE, metadata={"format": "pt"})

    @classmethod
    def read(cls, artifact: Artifact) -> Self:
        stored = load_file(artifact.file(cls.FILE))
        rows, columns = (int(n) for n in stored["sides"])
        energies = {m: stored[f"{m}_EK"] for m in MATRICES}
        return cls(energies, stored["tokens_E"], stored["whole_E"], (rows, columns), int(stored["itemsize"]))


def global_ranks(spectra: Mapping[int, Spectra], moved: Mapping[int, Mapping[str, float]], how: Decomposition) -> Ranks:
    """The ranks of all matrices of all layers that cost least within the budget that the ratio leaves.

    `moved`: per layer, how far the model's predictions move when its gate and up, or its down matrices, are cut; squared errors are
    weighted so that they add up to that movement. Raises ValueError if experts that stay whole leave too little for the others.
    """
    items: list[list[Spectrum]] = []
    owners: list[tuple[int, int, tuple[str, ...]]] = []
    budget, total, fixed, least, itemsize, same = 1 - how.ratio, 0, 0, 0, 0, 0.0
    ranks = {layer: {m: [0] * len(seen.tokens_E) for m in MATRICES} for layer, seen in spectra.items()}
    for layer, seen in spectra.items():
        rows, columns = seen.sides
        itemsize, cut = seen.itemsize, moved_rank(rows, columns)
        for part, matrices in PARTS.items():
            # experts that stay whole were not cut when the movement was measured
            lost = sum(float(seen.energies[m][seen.whole_E == 0, cut:].sum()) for m in matrices)
            weight = max(moved[layer][part], 0.0) / max(lost, 1e-30)
            for expert, whole in enumerate(seen.whole_E):
                size = rows * columns * itemsize * len(matrices)
                total += size
                if whole:
                    fixed += size
                    continue
                least += fewest_parameters(rows, columns, how) * itemsize * len(matrices)
                shape = (rows, columns) if part == "gate_up" else (columns, rows)
                items.append([Spectrum(*shape, seen.energies[m][expert], weight) for m in matrices])
                owners.append((layer, expert, matrices))
                average = int(average_rank(1 - budget, rows, columns)) // how.multiple * how.multiple
                same += weight * sum(float(seen.energies[m][expert, average:].sum()) for m in matrices)
    left = int(total * budget) - fixed
    if left < least:
        raise ValueError(
            f"experts that saw too few tokens stay whole and take {fixed:,} of {int(total * budget):,} bytes: too many for the "
            f"others; the nearest ratio is {1 - (fixed + least) / total:.4f}, or calibrate on more tokens"
        )
    curves, options = choices(items, itemsize=itemsize, multiple=how.multiple, r_min=how.r_min, r_max=how.r_max or None)
    chosen, cost = allocate_curves(curves, left), 0.0
    for (layer, expert, matrices), curve, possible, option in zip(owners, curves, options, chosen, strict=True):
        for matrix, rank in zip(matrices, possible[option], strict=True):
            ranks[layer][matrix][expert] = rank
        cost += float(curve[option][1])
    return Ranks("global", int(total * budget), exactly(curves, left), cost, same, ranks=ranks)


@dataclass(frozen=True)
class Spectrum:
    """One matrix that may be cut: its shape, the squared error that each lost component adds, descending, and its weight."""

    rows: int
    columns: int
    energies: ArrayLike
    weight: float = 1.0


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
    """For each item, the curve of its options (bytes, weighted error) and the ranks of each option.

    An item is one matrix, or several of one shape that are all whole or all factored, such as gate and up of an expert. Within an
    item, components are added in the order of their gain.

    Ranks are multiples of `multiple` from r_min to r_max, and at most break-even unless forced; `itemsize` is the bytes of a
    weight; `whole` lets an item stay as it is. Raises ValueError if nothing is left to choose.
    """
    if multiple < 1 or r_min < 1:
        raise ValueError(f"r_min={r_min} and multiple={multiple} must be at least 1")
    built = [_item(spectra, itemsize, multiple, r_min, r_max, whole, force) for spectra in items]
    return [curve for curve, _ in built], [ranks for _, ranks in built]


def _clipped_shares(share: NDArray[np.float64], total: int, low: int, high: int) -> NDArray[np.float64]:
    """`total` divided in proportion to the shares, each clipped to [`low`, `high`]; the factor is found by bisection."""
    below, above = 0.0, high / float(share.min())
    for _ in range(200):
        factor = (below + above) / 2
        below, above = (factor, above) if np.clip(share * factor, low, high).sum() < total else (below, factor)
    return np.clip(share * above, low, high)


def _item(
    spectra: Sequence[Spectrum], itemsize: int, multiple: int, r_min: int, r_max: int | None, whole: bool, force: bool
) -> tuple[NDArray[np.float64], list[tuple[int, ...]]]:
    """The curve of an item's options, and the ranks of each option."""
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
