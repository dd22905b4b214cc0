"""Swap search over the experts of one layer: steepest descent over single exchanges, and elimination for every count at once.

Shapes are suffixes: E experts, N experts and "none", S subsets.
"""

from collections.abc import Iterable, Sequence
from random import Random

import torch
from torch import Tensor

from moeflow.methods.prune.evaluated import AT_ONCE, Evaluate, Found, enumerate_all
from moeflow.methods.prune.gram import Weighed
from moeflow.methods.prune.subsets import STARTS, Subset, check, check_subset, count_subsets, draw


def search(
    evaluate: Evaluate, experts: int, keep: int, *, groups: int = 1, protected: Sequence[int] = (), seed: int = 0, layer: int = 0,
    best: int = 3, starts: int = STARTS, given: Iterable[Subset] = (),
) -> list[tuple[Subset, float]]:  # fmt: skip
    """The `best` subsets of kept experts that a descent from several subsets finds, with their losses, best first.

    Every step makes the one exchange of a kept for a dropped expert that lowers the loss most, until none does. It begins at the
    `given` subsets (the best by a score, say), at the one that is left when the cheapest expert goes again and again, and at
    random ones, `starts` in all. Where `evaluate` is a `Weighed` layer a step costs about as much as evaluating a few subsets;
    any other function is asked for every neighbour. Raises ValueError where a parameter is out of its range.
    """
    check(experts, keep, groups=groups, protected=protected, best=best, starts=starts)
    if count_subsets(experts, keep, groups, protected) <= starts:
        return enumerate_all(evaluate, experts, keep, groups=groups, protected=protected, best=best)
    around = Around(evaluate, experts, groups, protected)
    random = Random(f"{seed}/{layer}")
    begin = [tuple(sorted(subset)) for subset in given][:starts]
    for subset in begin:
        check_subset(subset, experts, keep, groups, protected)
    if len(begin) < starts:
        begin.append(around.eliminate(tuple(range(experts)), keep))
    begin += [draw(random, experts, keep, groups, protected) for _ in range(starts - len(begin))]
    for subset in begin:
        around.descend(subset)
    around.look(around.found.best(1, keep)[0][0], best)
    return around.found.best(best, keep)


def nested(
    evaluate: Evaluate, experts: int, least: int, *, groups: int = 1, protected: Sequence[int] = (), refine: bool = True,
) -> dict[int, tuple[Subset, float]]:  # fmt: skip
    """For every count from all `experts` down to `least`, in steps of `groups`: a good subset of so many, and its loss.

    The expert that costs least goes, again and again. With `refine`, each subset is then improved by exchanges, and the next
    expert goes from the improved one; without, every subset lies within the one before. Raises ValueError as `check` does.
    """
    check(experts, least, groups=groups, protected=protected)
    around = Around(evaluate, experts, groups, protected)
    subset = tuple(range(experts))
    found = {experts: (subset, around.found.losses([subset])[0])}
    for keep in range(experts - groups, least - 1, -groups):
        subset = around.eliminate(subset, keep)
        if refine:
            subset = around.descend(subset)
        found[keep] = (subset, around.found.losses([subset])[0])
    return found


class Around:
    """The neighbours of a subset: all that are one exchange, or one removal, away."""

    def __init__(self, evaluate: Evaluate, experts: int, groups: int, protected: Iterable[int]) -> None:
        self.evaluate, self.experts, self.groups = evaluate, experts, groups
        self.found = Found(evaluate, experts)
        self.been: set[Subset] = set()
        group_E = torch.arange(experts) // (experts // groups)
        free_E = torch.ones(experts, dtype=torch.bool)
        free_E[list(protected)] = False
        self.exchange_EN = torch.cat(
            [(group_E[:, None] == group_E) & free_E[:, None], torch.zeros(experts, 1, dtype=torch.bool)], 1
        )
        self.group_E, self.free_E = group_E, free_E

    def losses(self, subset: Subset, legal_EN: Tensor) -> Tensor:
        """The losses of the neighbours that are `legal_EN`, fp64 [E, N]; infinite elsewhere."""
        mask_E = torch.zeros(self.experts, dtype=torch.bool)
        mask_E[list(subset)] = True
        if isinstance(self.evaluate, Weighed):
            return self.evaluate.neighbours(mask_E, legal_EN).cpu()
        legal_EN = legal_EN & mask_E[:, None] & ~torch.cat([mask_E, mask_E.new_zeros(1)])
        moves = legal_EN.nonzero().tolist()
        loss_EN = torch.full(legal_EN.shape, torch.inf, dtype=torch.float64)
        for at in range(0, len(moves), AT_ONCE):
            part = moves[at : at + AT_ONCE]
            losses = self.found.losses([self.moved(subset, a, b) for a, b in part])
            for (a, b), loss in zip(part, losses, strict=True):
                loss_EN[a, b] = loss
        return loss_EN

    def moved(self, subset: Subset, out: int, into: int) -> Subset:
        return tuple(sorted((set(subset) - {out}) | ({into} if into < self.experts else set())))

    def descend(self, subset: Subset) -> Subset:
        """The subset that no exchange improves, reached from this one by the best exchange each time."""
        loss = self.found.losses([subset])[0]
        while subset not in self.been:
            self.been.add(subset)
            loss_EN = self.losses(subset, self.exchange_EN)
            move = int(loss_EN.argmin())
            if not float(loss_EN.flatten()[move]) < loss:
                break
            there = self.moved(subset, *divmod(move, self.experts + 1))
            # an exchange's loss is incremental, the subset's own decides
            if not (new := self.found.losses([there])[0]) < loss:
                break
            subset, loss = there, new
        return subset

    def eliminate(self, subset: Subset, keep: int) -> Subset:
        """`keep` of the subset: the expert that costs least goes, again and again, from every group in turn."""
        while len(subset) > keep:
            counts = torch.bincount(self.group_E[list(subset)], minlength=self.groups)
            legal_EN = torch.zeros_like(self.exchange_EN)
            legal_EN[:, -1] = self.free_E & (counts == counts.max())[self.group_E]
            loss_EN = self.losses(subset, legal_EN)
            subset = self.moved(subset, int(loss_EN[:, -1].argmin()), self.experts)
        return subset

    def look(self, subset: Subset, count: int) -> None:
        """Evaluate the best `count` exchanges of a subset themselves: runners-up are mostly found there."""
        loss_EN = self.losses(subset, self.exchange_EN)
        moves = loss_EN.flatten().argsort()[:count].tolist()
        self.found.losses([self.moved(subset, *divmod(m, self.experts + 1)) for m in moves if loss_EN.flatten()[m] < torch.inf])
