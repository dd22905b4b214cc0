"""Which subsets of a layer's experts may be kept, and how many there are. Combinatorics, no torch."""

from collections.abc import Iterator
from itertools import combinations, product
from math import comb

ENUMERATE = "enumerate"
MAX_SUBSETS = 20_000

Subset = tuple[int, ...]


def count_subsets(experts: int, keep: int, groups: int = 1) -> int:
    """How many ways there are to keep `keep` of `experts`, the same number in every group."""
    return comb(experts // groups, keep // groups) ** groups


def all_subsets(experts: int, keep: int, groups: int = 1) -> Iterator[Subset]:
    """Every way to keep `keep` experts, ascending each, in the order in which the dropped sets follow each other.

    The authors' code goes through the dropped sets in lexical order and keeps the first of equals.
    """
    size = experts // groups
    drops = [list(combinations(range(g * size, (g + 1) * size), size - keep // groups)) for g in range(groups)]
    for parts in product(*drops):
        dropped = {e for part in parts for e in part}
        yield tuple(e for e in range(experts) if e not in dropped)
