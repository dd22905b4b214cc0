"""Which subsets of a layer's experts may be kept, and how many there are. Combinatorics, no torch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from math import comb, prod
from random import Random

MAX_SUBSETS = 20_000
"""The most subsets that are enumerated."""

Subset = tuple[int, ...]


@dataclass(frozen=True)
class Subsets:
    """Every way to keep `keep` of a layer's experts: the same number in each router group, and always the protected ones.

    Raises ValueError if there is none.
    """

    experts: int
    keep: int
    groups: int = 1
    protected: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.experts:
            raise ValueError(f"keep={self.keep} must lie between 1 and the layer's {self.experts} experts")
        if self.groups < 1 or self.experts % self.groups or self.keep % self.groups:
            raise ValueError(
                f"keep={self.keep} of {self.experts} experts must both be multiples of the router's groups={self.groups}, at least "
                "1"
            )
        protected = list(self.protected)
        if len(set(protected)) != len(protected) or not all(0 <= e < self.experts for e in protected):
            raise ValueError(f"protected={protected} must be different experts between 0 and {self.experts - 1}")
        crowded = max(self.experts // self.groups - len(pool) for pool in self.pools)
        if crowded > self.keep // self.groups:
            where = f" in each of {self.groups} groups" if self.groups > 1 else ""
            raise ValueError(
                f"{crowded} experts are protected where keep={self.keep} leaves {self.keep // self.groups}{where}; protect fewer "
                "or keep more"
            )

    @property
    def pools(self) -> list[list[int]]:
        """The experts of each group that are not protected, ascending."""
        size, spared = self.experts // self.groups, set(self.protected)
        return [[e for e in range(g * size, (g + 1) * size) if e not in spared] for g in range(self.groups)]

    @property
    def dropped(self) -> int:
        """How many experts of each group are dropped."""
        return (self.experts - self.keep) // self.groups

    @property
    def count(self) -> int:
        return prod(comb(len(pool), self.dropped) for pool in self.pools)

    def __iter__(self) -> Iterator[Subset]:
        """Every subset, its experts ascending.

        Dropped sets come in lexical order, as in the NAEE authors' code, which keeps the first of equals.
        """
        for parts in product(*(list(combinations(pool, self.dropped)) for pool in self.pools)):
            yield without(self.experts, (e for part in parts for e in part))

    def draw(self, random: Random) -> Subset:
        """Draw one of the subsets uniformly."""
        return without(self.experts, (e for pool in self.pools for e in random.sample(pool, self.dropped)))

    def check(self, subset: Subset) -> None:
        """Raise ValueError if this is not one of the subsets."""
        dropped = without(self.experts, subset)
        equally = all(sum(e in pool for e in dropped) == self.dropped for pool in self.pools)
        if len(subset) != self.keep or len(dropped) != self.experts - self.keep or not equally:
            raise ValueError(
                f"the subset {list(subset)} does not keep {self.keep} of {self.experts} experts, {self.keep // self.groups} in "
                f"each of {self.groups} groups and the protected {list(self.protected)} among them"
            )


def without(experts: int, dropped: Iterable[int]) -> Subset:
    """The experts that stay if these are dropped, and the other way round."""
    gone = set(dropped)
    return tuple(e for e in range(experts) if e not in gone)
