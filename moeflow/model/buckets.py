"""How the factors of experts with different ranks lie in one parameter: those of nearly equal ranks are padded alike.

A parameter has a row for each rank, padding included: [R, N] of first factors, [R, M] of second ones. A bucket of experts is a run
of rows, and what lies in it is one stack: [E, R, N] of first factors, those of gate above those of up, and [E, M, R] of second
ones, the stack of gate's before that of up's. So each product of a bucket is one kernel, and that of one expert reads memory in
order. Shapes are suffixes: E experts of a bucket, R their padded rank, M rows and N columns of a matrix. No torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MULTIPLES = (16, 8, 1)
"""Ranks are padded to a multiple of the first of these that costs little. Kernels of several experts at once need 8 or more."""

ROUNDED, TOGETHER = 1.03, 1.04
"""How much larger padding to a multiple, and then to the bucket's largest, may make the factors."""

Ranks = tuple[tuple[int, ...], ...]
"""The rank of each expert, by matrix: gate and up, or one alone."""


@dataclass(frozen=True)
class Bucket:
    """Experts, by their place among those that have factors, and the rank of each matrix that all are padded to."""

    experts: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def rows(self) -> int:
        return len(self.experts) * sum(self.ranks)


@dataclass(frozen=True)
class Buckets:
    """All buckets of a parameter, in the order of its rows."""

    every: tuple[Bucket, ...]
    multiple: int

    @property
    def rows(self) -> int:
        return sum(bucket.rows for bucket in self.every)

    @property
    def aligned(self) -> bool:
        """Whether kernels that compute all experts of a bucket together can read it."""
        return self.multiple >= 8

    def first(self, factors_RN: "Tensor") -> "Iterator[Tensor]":
        """The first factors of each bucket, [E, R, N], those of gate above those of up."""
        for bucket, rows in zip(self.every, factors_RN.split([b.rows for b in self.every]), strict=True):
            yield rows.view(len(bucket.experts), sum(bucket.ranks), factors_RN.shape[1])

    def second(self, factors_RM: "Tensor") -> "Iterator[tuple[Tensor, ...]]":
        """The second factors of each bucket, [E, M, R] for each matrix."""
        for bucket, rows in zip(self.every, factors_RM.split([b.rows for b in self.every]), strict=True):
            each = rows.split([len(bucket.experts) * rank for rank in bucket.ranks])
            sides = [(len(bucket.experts), factors_RM.shape[1], rank) for rank in bucket.ranks]
            yield tuple(one.view(*shape) for one, shape in zip(each, sides, strict=True))

    def first_of(self, factors_RN: "Tensor") -> "list[Tensor]":
        """The first factors of each expert, [R, N]."""
        rows = factors_RN.split([sum(b.ranks) for b in self.every for _ in b.experts])
        return [rows[at] for at in self._place]

    def second_of(self, factors_RM: "Tensor") -> "list[tuple[Tensor, ...]]":
        """The second factors of each expert, [R, M] by their bytes for each matrix: `.view(M, R)` is the factor."""
        sizes = [rank for b in self.every for rank in b.ranks for _ in b.experts]
        rows, begins, at = factors_RM.split(sizes), [], 0
        for b in self.every:
            begins += [tuple(at + i + m * len(b.experts) for m in range(len(b.ranks))) for i in range(len(b.experts))]
            at += len(b.experts) * len(b.ranks)
        return [tuple(rows[i] for i in begins[place]) for place in self._place]

    @cached_property
    def spans(self) -> list[tuple[slice, tuple[slice, ...]]]:
        """The rows of each expert's first factors, and those of each of its second ones."""
        made: dict[int, tuple[slice, tuple[slice, ...]]] = {}
        start = 0
        for b in self.every:
            for at, e in enumerate(b.experts):
                first, seconds, block = start + at * sum(b.ranks), [], start
                for rank in b.ranks:
                    seconds.append(slice(block + at * rank, block + (at + 1) * rank))
                    block += len(b.experts) * rank
                made[e] = slice(first, first + sum(b.ranks)), tuple(seconds)
            start += b.rows
        return [made[e] for e in range(len(made))]

    @cached_property
    def _place(self) -> list[int]:
        """Where each expert stands when the buckets' experts are counted through."""
        order = [e for b in self.every for e in b.experts]
        return sorted(range(len(order)), key=order.__getitem__)


@lru_cache(maxsize=4096)
def buckets(ranks: Ranks) -> Buckets:
    """The buckets of experts of these ranks: consecutive by size, each as many as `TOGETHER` allows."""
    exact = sum(map(sum, ranks))
    multiple = next(m for m in MULTIPLES if m == 1 or sum(_up(r, m) for of in ranks for r in of) <= ROUNDED * exact)
    each = [tuple(_up(of[e], multiple) for of in ranks) for e in range(len(ranks[0]))]
    made: list[list[int]] = []
    for e in sorted(range(len(each)), key=lambda e: (sum(each[e]), e)):
        if made and _fits([each[i] for i in (*made[-1], e)]):
            made[-1].append(e)
        else:
            made.append([e])
    return Buckets(tuple(Bucket(tuple(sorted(b)), _largest([each[e] for e in b])) for b in made), multiple)


def _fits(each: Sequence[tuple[int, ...]]) -> bool:
    return len(each) * sum(_largest(each)) <= TOGETHER * sum(map(sum, each))


def _largest(each: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(max, zip(*each, strict=True)))


def _up(rank: int, multiple: int) -> int:
    return -(-rank // multiple) * multiple
