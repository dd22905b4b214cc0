"""Searches over many experts on one layer: the genetic search beside what it beats, and the swap search beside the genetic one.

First: d=512, F=352, 64 experts, top-6, 16 dropped, 4,096 tokens, fp32; population 100, 50 generations (MoE-I2). Beaten is the same
search with every individual's routed experts run again, nothing memoised on either side; it is timed on two generations and
scaled to 50. Our time includes running the experts and forming the Gram matrices.

Second: 32 and 64 experts in pairs that replace each other (near-duplicates with near-duplicate router rows), a quarter dropped,
1,024 tokens, 20 seeds. The genetic search runs, memoised, for as long as the swap search took, and to the end of the generation.
"""

import time
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu_inputs import ARCHS
from benchmarks.rows import Row
from moeflow.methods.prune import genetic, swap
from moeflow.methods.prune.errors import mask_of
from moeflow.methods.prune.evaluated import Evaluate
from moeflow.methods.prune.gram import Weighed
from moeflow.methods.prune.searches import Search
from moeflow.methods.prune.subsets import Subset, Subsets
from moeflow.model.moe import MLP, MoELayer
from moeflow.model.router import Router
from tests.layers import squared_errors_direct

D, F, E, TOP_K, DROP, TOKENS = 512, 352, 64, 6, 16, 4096
TIMED = 2
SEEDS = 20
SAME = 1e-6
"""Two losses that differ by less, relatively, are the same subset's in different batches."""


def layer() -> MoELayer:
    torch.manual_seed(0)
    experts = tuple(MLP(torch.randn(F, D) * 0.02, torch.randn(F, D) * 0.02, torch.randn(D, F) * 0.02) for _ in range(E))
    return MoELayer(Router(ARCHS["mixtral"], top_k=TOP_K), torch.randn(E, D) * 0.1, experts)


def planted(experts: int, seed: int, *, top_k: int = 4, near: float = 0.2, width: int = 32) -> MoELayer:
    """A layer whose experts are pairs, scattered: the second is the first with a share `near` of noise, in its router row too."""
    draw = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    shapes = ((width // 2, width), (width // 2, width), (width, width // 2))
    order = torch.randperm(experts, generator=draw).tolist()
    router_ED = 0.3 * r(experts, width)
    mlps: dict[int, MLP] = {}
    for one, other in zip(order[::2], order[1::2], strict=True):
        first = [r(*s) for s in shapes]
        mlps[one], mlps[other] = MLP(*first), MLP(*(m + near * r(*m.shape) for m in first))
        router_ED[other] = router_ED[one] + near * 0.3 * r(width)
    return MoELayer(Router(ARCHS["mixtral"], top_k=top_k), router_ED, tuple(mlps[e] for e in range(experts)))


class TimeIsUp(Exception):
    pass


def genetic_for(seconds: float, evaluate: Evaluate, experts: int, keep: int, seed: int) -> float:
    """The best loss that the genetic search has when the time is up, at the end of a generation."""
    best, end = torch.inf, time.perf_counter() + seconds

    def save(state: genetic.State) -> None:
        nonlocal best
        best = min(loss for _, loss in state["losses"])
        if time.perf_counter() > end:
            raise TimeIsUp

    with suppress(TimeIsUp):
        genetic.search(evaluate, Subsets(experts, keep), Search("genetic", seed=seed, generations=1 << 30), save=save)
    return best


def against_plain() -> list[Row]:
    moe, x_TD = layer(), torch.randn(TOKENS, D)
    goal_TD = moe.routed_output(x_TD)
    moe.routed_output(x_TD)

    def again(mask_SE: Tensor) -> Tensor:
        return torch.stack([(moe.routed_output(x_TD, allowed_E) - goal_TD).double().norm() for allowed_E in mask_SE])

    start = time.perf_counter()
    weighed, subsets, how = Weighed.of(moe, [x_TD], drop_at_most=DROP), Subsets(E, E - DROP), Search("genetic")
    best: list[tuple[Subset, float]] = genetic.search(weighed, subsets, how, memoise=False)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    genetic.search(again, subsets, replace(how, generations=TIMED), memoise=False)
    plain = (time.perf_counter() - start) / TIMED * how.generations
    direct, _ = squared_errors_direct(moe, x_TD, mask_of([subset for subset, _ in best], E))
    error = max(abs(loss**2 / float(d) - 1) for (_, loss), d in zip(best, direct, strict=True))
    what = f"genetic search, against plain re-evaluation ({TIMED} generations, scaled to {how.generations})"
    return [
        Row(what, plain / ours, "at least", 100.0, "times faster"),
        Row("genetic search, relative difference of its best squared errors from direct evaluation", error, "at most", 1e-4, ""),
    ]  # fmt: skip


def against_genetic(experts: int) -> list[Row]:
    keep, ratios = experts - experts // 4, []
    for seed in range(SEEDS):
        moe, x_TD = planted(experts, seed), torch.randn(1024, 32, generator=torch.Generator().manual_seed(seed))
        weighed = Weighed.of(moe, [x_TD], drop_at_most=experts - keep)
        start = time.perf_counter()
        ours = swap.search(weighed, Subsets(experts, keep), Search("swap", seed=seed))[0][1]
        ratios.append(ours / genetic_for(time.perf_counter() - start, weighed, experts, keep, seed))
    better, worse = sum(r < 1 - SAME for r in ratios), sum(r > 1 + SAME for r in ratios)
    of = f"{better} better, {SEEDS - better - worse} equal, {worse} worse of {SEEDS} seeds"
    name = f"swap search beside genetic on equal time, {experts} planted experts, {keep} kept"
    return [
        Row(f"{name}: mean ratio of the losses ({of})", sum(ratios) / SEEDS, "at most", 1.0 + SAME, ""),
        Row(f"{name}: largest ratio", max(ratios), "at most", 1.0 + SAME, ""),
    ]


@torch.inference_mode()
def main() -> list[Row]:
    return [*against_plain(), *against_genetic(32), *against_genetic(64)]
