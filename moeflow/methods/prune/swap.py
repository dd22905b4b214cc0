"""Swap search over the experts of one layer: steepest descent, exchanging one kept for one dropped expert at a time.

Shapes are suffixes: E experts, N experts and "none", S subsets.
"""

from collections.abc import Iterable
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import pad

from moeflow.methods.prune.errors import mask_of
from moeflow.methods.prune.evaluated import AT_ONCE, Evaluate, Evaluated, enumerate_all
from moeflow.methods.prune.gram import Weighed
from moeflow.methods.prune.searches import Search
from moeflow.methods.prune.subsets import Subset, Subsets


def search(
    evaluate: Evaluate, subsets: Subsets, how: Search, *, layer: int = 0, begin: Iterable[Subset] = ()
) -> list[tuple[Subset, float]]:
    """The best subsets of kept experts that a descent from several subsets finds, with their losses, best first.

    Each step makes the exchange of a kept for a dropped expert that lowers the loss most, until none does. There are `how.starts`
    descents: from the subsets in `begin` (the best by a score, say), from the one left after repeatedly dropping the cheapest
    expert, and from random ones. If `evaluate` is a `Weighed` layer, a step costs about as much as evaluating a few subsets; any
    other function is called for every neighbour. Raises ValueError if a subset in `begin` is not one of `subsets`.
    """
    if subsets.count <= how.starts:
        return enumerate_all(evaluate, subsets, how, layer=layer)
    neighbours = Neighbours(evaluate, subsets)
    random = Random(f"{how.seed}/{layer}")
    starts = [tuple(sorted(subset)) for subset in begin][: how.starts]
    for subset in starts:
        subsets.check(subset)
    if len(starts) < how.starts:
        starts.append(neighbours.eliminate(tuple(range(subsets.experts))))
    starts += [subsets.draw(random) for _ in range(how.starts - len(starts))]
    for subset in starts:
        neighbours.descend(subset)
    evaluated, keep = neighbours.evaluated, subsets.keep
    neighbours.evaluate_nearest(evaluated.best(1, keep)[0][0], how.best)
    return evaluated.best(how.best, keep)


class Neighbours:
    """The subsets that are one exchange or one removal away from a subset. A move is the index of an entry of a table [E, N]."""

    def __init__(self, evaluate: Evaluate, subsets: Subsets) -> None:
        self.evaluate, self.subsets, self.experts = evaluate, subsets, subsets.experts
        self.evaluated = Evaluated(evaluate, self.experts)
        self.passed: set[Subset] = set()
        self.group_E = torch.arange(self.experts) // (self.experts // subsets.groups)
        self.free_E = torch.ones(self.experts, dtype=torch.bool)
        self.free_E[list(subsets.protected)] = False
        self.exchange_EN = pad((self.group_E[:, None] == self.group_E) & self.free_E[:, None], (0, 1))

    def losses(self, subset: Subset, legal_EN: Tensor) -> Tensor:
        """The losses of the neighbours in `legal_EN`, fp64 [E, N]; infinite elsewhere."""
        mask_E = mask_of([subset], self.experts)[0]
        if isinstance(self.evaluate, Weighed):
            return self.evaluate.neighbours(mask_E, legal_EN).cpu()
        moves = (legal_EN & mask_E[:, None] & ~pad(mask_E, (0, 1))).flatten().nonzero()[:, 0]
        loss_EN = torch.full(legal_EN.shape, torch.inf, dtype=torch.float64)
        for part in moves.split(AT_ONCE):
            losses = self.evaluated.losses([self.moved(subset, move) for move in part.tolist()])
            loss_EN.view(-1)[part] = torch.tensor(losses, dtype=torch.float64)
        return loss_EN

    def moved(self, subset: Subset, move: int) -> Subset:
        out, into = divmod(move, self.experts + 1)
        return tuple(sorted({*subset, into} - {out, self.experts}))

    def descend(self, subset: Subset) -> None:
        """Make the best exchange again and again, until none improves the subset."""
        loss = self.evaluated.losses([subset])[0]
        while subset not in self.passed:
            self.passed.add(subset)
            loss_EN = self.losses(subset, self.exchange_EN)
            move = int(loss_EN.argmin())
            if not float(loss_EN.flatten()[move]) < loss:
                break
            there = self.moved(subset, move)
            # rounding errors add up in an exchange's loss, so the subset's own loss decides
            if not (new := self.evaluated.losses([there])[0]) < loss:
                break
            subset, loss = there, new

    def eliminate(self, subset: Subset) -> Subset:
        """Drop the cheapest expert again and again, from every group in turn; returns what is left."""
        while len(subset) > self.subsets.keep:
            counts = torch.bincount(self.group_E[list(subset)], minlength=self.subsets.groups)
            legal_EN = torch.zeros_like(self.exchange_EN)
            legal_EN[:, -1] = self.free_E & (counts == counts.max())[self.group_E]
            subset = self.moved(subset, int(self.losses(subset, legal_EN).argmin()))
        return subset

    def evaluate_nearest(self, subset: Subset, count: int) -> None:
        """Evaluate the best `count` exchanges of a subset, since most runners-up are among them."""
        loss, moves = self.losses(subset, self.exchange_EN).flatten().sort()
        self.evaluated.losses([self.moved(subset, m) for m in moves[:count][loss[:count].isfinite()].tolist()])
