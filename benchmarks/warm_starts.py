"""Would a search that begins at the last choice find the same with less work? Behind docs/decisions/22-no-warm-starts.md.

The last choice is that of a layer, and the search of now is over the same layer fine-tuned: its matrices and router moved by 2 %.
First, planted layers (`benchmarks.genetic`), 32 experts of which 24 stay, 20 seeds: how often swap and genetic search find other
sets when they begin there. Second, all 1,820 subsets of 16 experts, d=256, F=128, 2,048 tokens, in eight pieces of which each adds
to a subset's squared error: a subset is left out once it is behind the best known. That is exact. Beside it the same from a start
that needs no last choice, a descent from one subset of the layer itself; and how long comparing takes at all.
"""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.genetic import planted
from benchmarks.rows import Row
from moeflow.methods.prune import genetic, swap
from moeflow.methods.prune.errors import mask_of
from moeflow.methods.prune.evaluated import enumerate_all
from moeflow.methods.prune.gram import Weighed
from moeflow.methods.prune.searches import Search
from moeflow.methods.prune.subsets import Subset, Subsets, without
from moeflow.model.moe import MLP, MoELayer

SEEDS, MOVED = 20, 0.02


def tuned(moe: MoELayer, seed: int) -> MoELayer:
    """The layer after a fine-tune: every matrix moved by `MOVED` of its own size."""
    draw = torch.Generator().manual_seed(1000 + seed)

    def moved(w: Any) -> Tensor:
        noise = torch.randn(*w.shape, generator=draw)
        return w + MOVED * noise * w.norm() / noise.norm()

    experts = tuple(MLP(*map(moved, (e.gate_FD, e.up_FD, e.down_DF))) for e in moe.experts)  # all dense
    return replace(moe, router_ED=moved(moe.router_ED), experts=experts)


def from_there(weighed: Weighed, subsets: Subsets, how: Search, last: Subset) -> list[tuple[Subset, float]]:
    """The genetic search with the last choice in its first generation, in the place of the worst of those that stay."""
    states: list[genetic.State] = []
    genetic.search(weighed, subsets, replace(how, generations=1), save=states.append)
    state = states[0]
    state["people"][-1] = list(without(subsets.experts, last))
    return genetic.search(weighed, subsets, how, resume=state)


def others() -> list[Row]:
    """On how many seeds a search that begins at the last choice finds another set."""
    other, subsets = {"swap": 0, "genetic": 0}, Subsets(32, 24)
    for seed in range(SEEDS):
        before, x_TD = planted(32, seed), torch.randn(1024, 32, generator=torch.Generator().manual_seed(seed))
        old, new = (Weighed.of(moe, [x_TD], drop_at_most=8) for moe in (before, tuned(before, seed)))
        by_swap, by_genetic = Search("swap", seed=seed, starts=2), Search("genetic", seed=seed)
        last = swap.search(old, subsets, by_swap)[0][0]
        cold, warm = swap.search(new, subsets, by_swap), swap.search(new, subsets, by_swap, begin=[last])
        other["swap"] += cold[0][0] != warm[0][0] or {s for s, _ in cold} != {s for s, _ in warm}
        last = genetic.search(old, subsets, by_genetic)[0][0]
        cold, warm = genetic.search(new, subsets, by_genetic), from_there(new, subsets, by_genetic, last)
        other["genetic"] += {s for s, _ in cold} != {s for s, _ in warm}
    name = f"of {SEEDS} seeds, those on which a search from the last choice finds other sets"
    return [Row(f"{method}: {name}", n, "at least", 1, "") for method, n in other.items()]


def evaluated(pieces: list[Weighed], mask_SE: Tensor, bound: float) -> float:
    """The part of all evaluations, of a subset on a piece, that is left if a subset goes once it is behind `bound`, squared."""
    alive, error_S, done = torch.arange(len(mask_SE)), torch.zeros(len(mask_SE), dtype=torch.float64), 0
    for piece in pieces:
        done += len(alive)
        error_S[alive] += piece.squared_errors(mask_SE[alive])
        alive = alive[error_S[alive] <= bound * (1 + 1e-9)]
    return done / len(mask_SE) / len(pieces)


def bounded() -> list[Row]:
    """What an exact bound saves of comparing all subsets, and how much there is to save."""
    before = planted(16, 0, width=256)
    x_TD, subsets, one = (
        torch.randn(2048, 256, generator=torch.Generator().manual_seed(0)),
        Subsets(16, 12),
        Search("swap", starts=1),
    )
    now = tuned(before, 0)
    start = time.perf_counter()
    whole = Weighed.of(now, [x_TD], drop_at_most=4)
    prepared = time.perf_counter() - start
    pieces = [Weighed.of(now, [x], drop_at_most=4) for x in x_TD.chunk(8)]
    start = time.perf_counter()
    best = enumerate_all(whole, subsets, Search("enumerate"), layer=0)
    compared = time.perf_counter() - start
    old = enumerate_all(Weighed.of(before, [x_TD], drop_at_most=4), subsets, Search("enumerate"), layer=0)
    mask_SE = mask_of([*subsets], 16)
    # the third best is the bound, because three sets are kept: of the last three, or of those that a descent passed
    by_last = max(float(whole.squared_errors(mask_of([s], 16))) for s, _ in old)
    by_descent = max(loss for _, loss in swap.search(whole, subsets, one)) ** 2
    print(f"best {best[0][0]}, last {old[0][0]}; prepared in {prepared:.2f} s, compared in {compared:.2f} s")
    return [
        Row("all subsets: evaluations left, with the last choices", evaluated(pieces, mask_SE, by_last), "at most", 1, ""),
        Row("all subsets: evaluations left, with a descent's sets", evaluated(pieces, mask_SE, by_descent), "at most", 1, ""),
        Row("all subsets: comparing them, beside preparing the layer", compared / prepared, "at most", 10, "times"),
    ]  # fmt: skip


@torch.inference_mode()
def main() -> list[Row]:
    return [*bounded(), *others()]
