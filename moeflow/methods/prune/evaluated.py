"""The losses of the subsets that a search has evaluated, each once, many at a time; and the search that evaluates all.

Shapes are suffixes: E experts, S subsets.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from moeflow.methods.prune.errors import mask_of
from moeflow.methods.prune.searches import Search
from moeflow.methods.prune.subsets import Subset, Subsets

Evaluate = Callable[[Tensor], Tensor]
"""The losses [S] of the subsets that a mask (bool [S, E]) allows: a `Weighed` layer, or any function."""

AT_ONCE = 1024
"""How many subsets are evaluated together if all are known beforehand."""


class Evaluated:
    """The loss of every subset that was evaluated. With `memoise` off, a repeated subset is evaluated again."""

    def __init__(
        self, evaluate: Evaluate, experts: int, known: Iterable[tuple[Subset, float]] = (), *, memoise: bool = True
    ) -> None:
        self.evaluate, self.experts, self.memoise = evaluate, experts, memoise
        self.loss = dict(known)

    def losses(self, subsets: Sequence[Subset]) -> list[float]:
        """The losses of subsets of kept experts, all of one size. Raises ValueError if a loss is NaN or infinite."""
        new = [s for s in dict.fromkeys(subsets) if s not in self.loss] if self.memoise else subsets
        if new:
            losses = self.evaluate(mask_of(new, self.experts)).tolist()
            if any(not -torch.inf < loss < torch.inf for loss in losses):
                raise ValueError("a subset's loss is NaN or infinite; compute in another precision (dtype=float32)")
            self.loss.update(zip(new, losses, strict=True))
        return [self.loss[s] for s in subsets]

    def best(self, count: int, keep: int) -> list[tuple[Subset, float]]:
        """The best subsets of `keep` experts so far, best first; ties go to the lexically smaller subset."""
        sized = [(subset, loss) for subset, loss in self.loss.items() if len(subset) == keep]
        return sorted(sized, key=lambda one: (one[1], one[0]))[:count]


def enumerate_all(evaluate: Evaluate, subsets: Subsets, how: Search, *, layer: int) -> list[tuple[Subset, float]]:
    """The `how.best` of all subsets, with their losses, best first (Lu et al., ACL 2024, section 3.2)."""
    evaluated, every = Evaluated(evaluate, subsets.experts), list(subsets)
    for at in range(0, len(every), AT_ONCE):
        evaluated.losses(every[at : at + AT_ONCE])
    return evaluated.best(how.best, subsets.keep)
