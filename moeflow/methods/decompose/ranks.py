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
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from moeflow.arch import MATRICES
from moeflow.methods.allocate import allocate_curves, exactly
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.rare import treatments
from moeflow.methods.records import Importance, Ranks
from moeflow.step import Artifact

PARTS = {"gate_up": ("gate", "up"), "down": ("down",)}
"""The parts of an expert whose matrices are whole or factored together, and measured together."""

EPSILON = 1e-12
"""What MoE-I2's formula adds to an importance, so that none is zero."""


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


def paper_ranks(importance: Sequence[float], average: float, most: int, how: Decomposition) -> list[int]:
    """The ranks of a layer's experts by importance I: (I + EPSILON)^alpha over its sum, times the sum of ranks (MoE-I2, 2024).

    The ranks sum exactly to `average` times the number of experts, rounded down to the multiple. The experts that are not clipped
    to [r_min, `most`] share in proportion what clipping takes or gives; what rounding down leaves goes to the largest remainders. A
    negative importance counts as zero. Raises ValueError if the sum cannot be reached.
    """
    if not all(isfinite(i) for i in importance):
        raise ValueError(f"importance {list(importance)} must be finite; the calibration overflowed")
    multiple, count = how.multiple, len(importance)
    low, high = -(-how.r_min // multiple), most // multiple
    # an average that is a simple fraction must not lose a rank to rounding
    total = floor(Fraction(average).limit_denominator(10**9) * count / multiple)
    if not low * count <= total <= high * count or low > high:
        nearest = min(max(total, low * count), high * count) / count * multiple
        way_out = f"the nearest is {nearest:.6g}" if low <= high else "there is none"
        raise ValueError(
            f"average rank {average:.6g} cannot be had with ranks from {how.r_min} to {most} in multiples of {multiple}; {way_out}"
        )
    share = (np.maximum(np.asarray(importance, dtype=np.float64), 0.0) + EPSILON) ** how.alpha
    exact = _clipped_shares(share, total, low, high)
    ranks = np.floor(exact + 1e-9).astype(int)
    order = sorted(range(count), key=lambda e: (ranks[e] - exact[e], e))
    for e in [e for e in order if ranks[e] < high][: total - int(ranks.sum())]:
        ranks[e] += 1
    return [int(r) * multiple for r in ranks]


def moved_rank(rows: int, columns: int) -> int:
    """The rank to which a layer is cut to measure how far the model's predictions move: two thirds of break-even."""
    return max(1, int(break_even(rows, columns) * 2 / 3))


def most_rank(rows: int, columns: int, how: Decomposition) -> int:
    """The largest rank that saves anything, or `r_max` if that is smaller."""
    even = int(break_even(rows, columns))
    return min(how.r_max, even) if how.r_max else even


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
    ranks = iter(paper_ranks(cut, left / len(cut), most_rank(*sides, how), how) if cut else ())
    return [0 if w else next(ranks) for w in whole]


@dataclass(frozen=True)
class Spectra:
    """How much each component of a layer's matrices adds to the expert's outputs on its routed tokens."""

    FILE: ClassVar[str] = "spectra.safetensors"

    energies: dict[str, NDArray[np.float64]]
    """Per matrix that the experts have, squared and descending: [E, K], K the smaller side."""
    tokens_E: NDArray[np.int64]
    """The number of recorded tokens that reach each expert."""
    whole_E: NDArray[np.int64]
    """1 for an expert that stays whole because too few tokens reach it."""
    sides: tuple[int, int]
    """The expert width F and the model width D."""
    itemsize: int
    """Bytes per weight."""
    first: int = 0
    """The number of the first expert in `energies`, where a task has treated a part of the layer's."""
    outputs_E: NDArray[np.int64] | None = None
    """Of a part: 1 for an expert in `energies` whose are of its outputs; those of others are of its weights, not yet scaled."""

    def write(self, folder: Path) -> None:
        numbers = {"sides": np.array(self.sides), "itemsize": np.array(self.itemsize)}
        each = {f"{m}_EK": energy for m, energy in self.energies.items()}
        of_part = {} if self.outputs_E is None else {"first": np.array(self.first), "outputs_E": self.outputs_E}
        tensors = {**each, "tokens_E": self.tokens_E, "whole_E": self.whole_E, **numbers, **of_part}
        save_file(tensors, folder / self.FILE, metadata={"format": "pt"})

    @classmethod
    def read(cls, artifact: Artifact) -> Self:
        stored = load_file(artifact.file(cls.FILE))
        rows, columns = (int(n) for n in stored["sides"])
        energies = {m: stored[f"{m}_EK"] for m in MATRICES if f"{m}_EK" in stored}
        first, outputs_E = int(stored.get("first", 0)), stored.get("outputs_E")
        return cls(energies, stored["tokens_E"], stored["whole_E"], (rows, columns), int(stored["itemsize"]), first, outputs_E)

    @staticmethod
    def joined(parts: Sequence["Spectra"]) -> "Spectra":
        """The layer's, of those of its parts, in any order.

        An expert with too few tokens has the spectrum of its weights, scaled to the energy per token of the layer's other experts.
        """
        parts = sorted(parts, key=lambda part: part.first)
        tokens_E = parts[0].tokens_E
        outputs_E = np.concatenate([part.outputs_E for part in parts if part.outputs_E is not None])
        energies = {m: np.concatenate([part.energies[m] for part in parts]) for m in parts[0].energies}
        for energy_EK in energies.values():
            sums_E = energy_EK.sum(1)
            per_token = float(sums_E[outputs_E == 1].sum()) / max(1, int(tokens_E[outputs_E == 1].sum()))
            for e in np.flatnonzero(outputs_E == 0):
                energy_EK[e] *= per_token * int(tokens_E[e]) / max(float(sums_E[e]), 1e-30)
        return Spectra(energies, tokens_E, parts[0].whole_E, parts[0].sides, parts[0].itemsize)


def global_ranks(spectra: Mapping[int, Spectra], moved: Mapping[int, Mapping[str, float]], how: Decomposition) -> Ranks:
    """The ranks of all matrices of all layers that cost least within the budget that the ratio leaves.

    `moved`: per layer, how far the model's predictions move when its gate and up, or its down matrices, are cut; squared errors are
    weighted so that they add up to that movement. Raises ValueError if experts that stay whole leave too little for the others.
    """
    curves: list[NDArray[np.float64]] = []
    owners: list[tuple[int, int, tuple[str, ...], list[tuple[int, ...]]]] = []
    total, fixed, least, same = 0, 0, 0, 0.0
    ranks = {layer: {m: [0] * len(of_layer.tokens_E) for m in of_layer.energies} for layer, of_layer in spectra.items()}
    for layer, of_layer in spectra.items():
        rows, columns = of_layer.sides
        cut, average = moved_rank(rows, columns), int(average_rank(how.ratio, rows, columns)) // how.multiple * how.multiple
        for part, all_matrices in PARTS.items():
            matrices = tuple(m for m in all_matrices if m in of_layer.energies)  # without the gate if experts have none
            # experts that stay whole were not cut when the movement was measured
            lost = sum(float(of_layer.energies[m][of_layer.whole_E == 0, cut:].sum()) for m in matrices)
            weight = max(moved[layer][part], 0.0) / max(lost, 1e-30)
            size = of_layer.itemsize * len(matrices)
            for expert, whole in enumerate(of_layer.whole_E):
                total += rows * columns * size
                if whole:
                    fixed += rows * columns * size
                    continue
                least += fewest_parameters(rows, columns, how) * size
                energies = [of_layer.energies[m][expert] for m in matrices]
                curve, options = choices(energies, weight, of_layer.sides, of_layer.itemsize, how)
                curves.append(curve)
                owners.append((layer, expert, matrices, options))
                same += weight * sum(float(energy_K[average:].sum()) for energy_K in energies)
    budget = int(total * (1 - how.ratio))
    left = budget - fixed
    if left < least:
        raise ValueError(
            f"experts that saw too few tokens stay whole and take {fixed:,} of {budget:,} bytes: too many for the others; the "
            f"nearest ratio is {1 - (fixed + least) / total:.4f}, or calibrate on more tokens"
        )
    cost = 0.0
    for (layer, expert, matrices, options), curve, option in zip(owners, curves, allocate_curves(curves, left), strict=True):
        for matrix, rank in zip(matrices, options[option], strict=True):
            ranks[layer][matrix][expert] = rank
        cost += float(curve[option][1])
    return Ranks("global", budget, exactly(curves, left), cost, same, ranks=ranks)


def choices(
    energies: Sequence[NDArray[np.float64]], weight: float, sides: tuple[int, int], itemsize: int, how: Decomposition
) -> tuple[NDArray[np.float64], list[tuple[int, ...]]]:
    """The curve of an item's options (bytes, weighted error), and the ranks of each option; the last leaves the item whole.

    An item is one matrix, or several of one shape that are all whole or all factored, such as gate and up of an expert. `energies`
    are the squared errors [K] that each lost component of a matrix adds. Components are added in the order of their gain. Ranks are
    multiples of `multiple` from r_min to r_max, and at most break-even; `itemsize` is the bytes of a weight.
    """
    rows, columns = sides
    multiple, count = how.multiple, len(energies)
    low, high = -(-how.r_min // multiple), most_rank(rows, columns, how) // multiple
    sizes: list[int] = []
    costs: list[float] = []
    ranks: list[tuple[int, ...]] = []
    if low <= high:
        # error left after each number of steps, of `multiple` components; a step never gains more than the one before it
        falling = [np.sort(energy_K)[::-1] * weight for energy_K in energies]
        tails = [np.append(np.cumsum(e[::-1])[::-1], 0.0)[: high * multiple + 1 : multiple] for e in falling]
        gains = sorted((-(t[n] - t[n + 1]), k, n) for k, t in enumerate(tails) for n in range(low, high))
        now = [low] * count
        cost, step = sum(float(t[low]) for t in tails), multiple * (rows + columns) * itemsize
        for gain, k, _ in [(0.0, -1, 0), *gains]:
            if k >= 0:
                now[k] += 1
                cost += gain
            sizes.append(sum(now) * step)
            costs.append(max(cost, 0.0))
            ranks.append(tuple(n * multiple for n in now))
    sizes.append(rows * columns * itemsize * count)
    costs.append(0.0)
    ranks.append((0,) * count)
    return np.column_stack([np.asarray(sizes, dtype=np.float64), costs]), ranks


def _clipped_shares(share: NDArray[np.float64], total: int, low: int, high: int) -> NDArray[np.float64]:
    """`total` divided in proportion to the shares, each clipped to [`low`, `high`]; the factor is found by bisection."""
    below, above = 0.0, high / float(share.min())
    for _ in range(200):
        factor = (below + above) / 2
        below, above = (factor, above) if np.clip(share * factor, low, high).sum() < total else (below, factor)
    return np.clip(share * above, low, high)
