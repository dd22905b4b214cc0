"""Which subsets of a layer's experts may be kept, how many there are, and what searches over them take. Combinatorics, no torch."""

from collections.abc import Iterable, Iterator
from itertools import combinations, product
from math import comb, prod
from random import Random

ENUMERATE = "enumerate"
MAX_SUBSETS = 20_000

POPULATION, GENERATIONS, PARENTS, MUTATION = 100, 50, 0.2, 0.3
"""The genetic search of MoE-I2 (Yang et al., Findings of EMNLP 2024): population and generations are the paper's, the rest ours."""

STARTS = 8
"""From how many subsets the swap search descends."""

Subset = tuple[int, ...]


def count_subsets(experts: int, keep: int, groups: int = 1, protected: Iterable[int] = ()) -> int:
    """How many ways there are to keep `keep` of `experts`, the same number in every group and the protected ones always."""
    drop = (experts - keep) // groups
    return prod(comb(len(pool), drop) for pool in droppable(experts, groups, protected))


def all_subsets(experts: int, keep: int, groups: int = 1, protected: Iterable[int] = ()) -> Iterator[Subset]:
    """Every way to keep `keep` experts, ascending each, in the order in which the dropped sets follow each other.

    The authors' code goes through the dropped sets in lexical order and keeps the first of equals.
    """
    drop = (experts - keep) // groups
    for parts in product(*(list(combinations(pool, drop)) for pool in droppable(experts, groups, protected))):
        yield without(experts, (e for part in parts for e in part))


def droppable(experts: int, groups: int = 1, protected: Iterable[int] = ()) -> list[list[int]]:
    """The experts of each group that are not protected, ascending."""
    size, spared = experts // groups, set(protected)
    return [[e for e in range(g * size, (g + 1) * size) if e not in spared] for g in range(groups)]


def draw(random: Random, experts: int, keep: int, groups: int = 1, protected: Iterable[int] = ()) -> Subset:
    """One of all subsets, each as likely as another."""
    drop = (experts - keep) // groups
    return without(experts, (e for pool in droppable(experts, groups, protected) for e in random.sample(pool, drop)))


def without(experts: int, dropped: Iterable[int]) -> Subset:
    """The experts that stay where these are dropped, and the other way round."""
    gone = set(dropped)
    return tuple(e for e in range(experts) if e not in gone)


def check(
    experts: int, keep: int, *, groups: int = 1, protected: Iterable[int] = (), best: int = 1, population: int = POPULATION,
    generations: int = GENERATIONS, parents: float = PARENTS, mutation: float = MUTATION, starts: int = STARTS,
) -> None:  # fmt: skip
    """Raise ValueError where a search cannot keep `keep` of `experts` like this, or a parameter of a search is out of its range."""
    protected = list(protected)
    if not 1 <= keep <= experts:
        raise ValueError(f"keep={keep} must lie between 1 and the layer's {experts} experts")
    if groups < 1 or experts % groups or keep % groups:
        raise ValueError(f"keep={keep} of {experts} experts must both be multiples of the router's groups={groups}, at least 1")
    if len(set(protected)) != len(protected) or not all(0 <= e < experts for e in protected):
        raise ValueError(f"protected={protected} must be different experts between 0 and {experts - 1}")
    size = experts // groups
    crowded = max(size - len(pool) for pool in droppable(experts, groups, protected))
    if crowded > keep // groups:
        where = f" in each of {groups} groups" if groups > 1 else ""
        raise ValueError(
            f"{crowded} experts are protected where keep={keep} leaves {keep // groups}{where}; protect fewer or keep more"
        )
    for name, count, least in (
        ("best", best, 1),
        ("population", population, 2),
        ("generations", generations, 1),
        ("starts", starts, 1),
    ):
        if count < least:
            raise ValueError(f"{name}={count} must be at least {least}")
    if not 0 < parents < 1:
        raise ValueError(f"parents={parents} is the share of a generation that has children and must lie between 0 and 1")
    if not 2 <= parents_of(population, parents) < population:
        raise ValueError(f"parents={parents} of population={population} must be two at least and leave room for a child")
    if not 0 <= mutation <= 1:
        raise ValueError(f"mutation={mutation} is a probability and must lie between 0 and 1")


def check_subset(subset: Subset, experts: int, keep: int, groups: int = 1, protected: Iterable[int] = ()) -> None:
    """Raise ValueError where this is no subset that a search for `keep` of `experts` could give."""
    size = experts // groups
    kept = [sum(e // size == g for e in subset) for g in range(groups)]
    if len(set(subset)) != len(subset) or kept != [keep // groups] * groups or not set(protected) <= set(subset):
        raise ValueError(
            f"the subset {list(subset)} does not keep {keep} of {experts} experts, {keep // groups} in each of {groups} groups and "
            f"the protected {list(protected)} among them"
        )


def parents_of(population: int, parents: float) -> int:
    """How many of a generation have children, and stay."""
    return round(population * parents)
