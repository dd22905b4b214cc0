"""How the experts that a layer keeps are chosen: the options, and the table of searches over subsets. No torch.

Adding a search: a file beside this one with a function (evaluate, subsets, how, *, layer) -> [(subset, loss), ...], best first, and
a row below. `moeflow.methods.prune.evaluated` has what such a function is written with.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moeflow.methods.scores import SCORES
from moeflow.options import check_choices, only


@dataclass(frozen=True)
class SubsetSearch:
    """One search over the subsets of a layer's experts."""

    options: tuple[str, ...]
    """The fields of `Search` that it takes beside best and seed."""
    begins: bool
    """Whether it takes subsets to begin at, as `begin`."""
    resumes: bool
    """Whether it can go on from a state that it saved: it takes `save` and `resume`."""
    code: str
    """The function, as module:name."""


ENUMERATE = "enumerate"
SUBSET_SEARCHES = {
    ENUMERATE: SubsetSearch((), False, False, "moeflow.methods.prune.evaluated:search"),
    "genetic": SubsetSearch(
        ("population", "generations", "parents", "mutation"), False, True, "moeflow.methods.prune.genetic:search"
    ),
    "swap": SubsetSearch(("starts",), True, False, "moeflow.methods.prune.swap:search"),
}

LAYERWISE, PROGRESSIVE = "layerwise", "progressive"
METHODS = (LAYERWISE, PROGRESSIVE, *SUBSET_SEARCHES, *SCORES)
"""Every way to choose: NAEE's two, the searches for the best sets of a layer, and the scores of single experts."""

if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[*METHODS]


@dataclass(frozen=True)
class Search:
    """How the experts that a layer keeps are chosen. Raises ValueError for what cannot be."""

    method: Name
    """layerwise or progressive (NAEE): every subset of each layer, on what the original or the pruned model gives it; enumerate,
    genetic, swap and the like: the best sets of each layer, among which blocks of layers may choose (MoE-I²); the others: the
    experts of the highest score."""
    loss: Literal["frobenius", "batch-sum"] = "frobenius"
    """What layerwise and progressive minimise: the norm of the change over all tokens (the paper), or the sum of the norms of all
    batches (the authors' code)."""
    seed: int = 0
    """Of whatever is drawn at random."""
    best: int = 3
    """Sets of each layer that enumerate, genetic and swap keep (MoE-I²'s K)."""
    block: int = 1
    """MoE layers that choose together among their sets (MoE-I²'s T); 1: each layer takes its best."""
    inputs: Literal["original", "progressive"] = "original"
    """What a block is given: the original model's hidden states, or those behind the layers that are pruned already."""
    population: int = 100
    """Members of a generation of the genetic search (the paper's)."""
    generations: int = 50
    """Generations of the genetic search (the paper's)."""
    parents: float = 0.2
    """The share of a generation that stays and has children."""
    mutation: float = 0.3
    """The probability that a child drops one other expert than its parents."""
    starts: int = 8
    """Subsets from which the swap search descends."""

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.best, self.block) < 1:
            raise ValueError(f"best={self.best} sets (K) and block={self.block} layers (T) must be at least 1")
        if self.inputs == "progressive" and self.block == 1:
            raise ValueError("inputs='progressive' is for blocks that choose together; give block=2 or more")
        for name, value, least in (
            ("population", self.population, 2),
            ("generations", self.generations, 1),
            ("starts", self.starts, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if not 0 < self.parents < 1:
            raise ValueError(f"parents={self.parents} is the share of a generation that has children and must lie between 0 and 1")
        if not 2 <= self.survivors < self.population:
            raise ValueError(
                f"parents={self.parents} of population={self.population} must be two at least and leave room for a child"
            )
        if not 0 <= self.mutation <= 1:
            raise ValueError(f"mutation={self.mutation} is a probability and must lie between 0 and 1")

    @property
    def survivors(self) -> int:
        """How many of a generation stay and have children."""
        return round(self.population * self.parents)

    def for_choice(self) -> "Search":
        """What one layer's choice by NAEE or by a score depends on; all else has its default, so that no key holds it."""
        method = ENUMERATE if self.method in (LAYERWISE, PROGRESSIVE) else self.method
        return Search(method, loss=self.loss, seed=self.seed)

    def for_candidates(self) -> "Search":
        """What the search for one layer's sets depends on; all else has its default, so that no key holds it."""
        taken = ("best", "seed", *check_search(self.method).options)
        return only(self, *taken)


def check_search(method: str) -> SubsetSearch:
    """The row of a search for the best sets of a layer. Raises ValueError, with the known ones, where there is none."""
    if method not in SUBSET_SEARCHES:
        raise ValueError(
            f"method={method!r} finds no sets among which layers could choose; choose one of {', '.join(SUBSET_SEARCHES)}"
        )
    return SUBSET_SEARCHES[method]
