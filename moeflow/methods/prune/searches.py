"""How the experts that a layer keeps are chosen: the options, and the table of searches over subsets. No torch.

To add a search, write a function (evaluate, subsets, how, *, layer) -> [(subset, loss), ...], best first, in a file beside this
one, and add a row below. `moeflow.methods.prune.evaluated` has helpers for it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from moeflow.methods.scores import SCORES
from moeflow.options import check_at_least, check_choices, only


@dataclass(frozen=True)
class SubsetSearch:
    """One search over the subsets of a layer's experts."""

    options: tuple[str, ...]
    """The fields of `Search` that it reads besides best and seed."""
    begins: bool
    """Does it take subsets to begin at, as `begin`?"""
    resumes: bool
    """Can it continue from a saved state? Then it takes `save` and `resume`."""
    code: str
    """The function, as module:name."""


ENUMERATE = "enumerate"
SUBSET_SEARCHES = {
    ENUMERATE: SubsetSearch((), False, False, "moeflow.methods.prune.evaluated:enumerate_all"),
    "genetic": SubsetSearch(
        ("population", "generations", "parents", "mutation"), False, True, "moeflow.methods.prune.genetic:search"
    ),
    "swap": SubsetSearch(("starts",), True, False, "moeflow.methods.prune.swap:search"),
}

LAYERWISE, PROGRESSIVE = "layerwise", "progressive"
METHODS = (LAYERWISE, PROGRESSIVE, *SUBSET_SEARCHES, *SCORES)
"""All methods: NAEE's two, the searches for the best sets of a layer, and the scores of single experts."""


@dataclass(frozen=True)
class Search:
    """How the experts that a layer keeps are chosen. Raises ValueError for invalid options."""

    method: Annotated[str, METHODS]
    """layerwise or progressive (NAEE): compare every subset of each layer, on inputs from the original or the pruned model;
    enumerate, genetic, swap: find the best sets of each layer, among which spans of layers may choose (MoE-I²); the others: keep
    the experts with the highest score."""
    loss: Literal["frobenius", "batch-sum"] = "frobenius"
    """What layerwise and progressive minimise: the norm of the change over all tokens (the paper), or the sum of the norms of all
    batches (the authors' code)."""
    batch: int = 8
    """Sequences of one batch, over which batch-sum sums."""
    seed: int = 0
    """The seed of all random draws."""
    best: int = 3
    """How many sets enumerate, genetic and swap keep for each layer (MoE-I²'s K)."""
    span: int = 1
    """How many consecutive MoE layers choose together among their sets (MoE-I²'s T); 1: each layer takes its best."""
    inputs: Literal["original", "progressive"] = "original"
    """A span's input: the original model's hidden states, or those behind the layers pruned so far."""
    population: int = 100
    """Members of a generation of the genetic search (the paper's)."""
    generations: int = 50
    """Generations of the genetic search (the paper's)."""
    parents: float = 0.2
    """The share of a generation that stays and has children."""
    mutation: float = 0.3
    """The probability that one of a child's dropped experts is exchanged for another."""
    starts: int = 8
    """How many subsets the swap search descends from."""
    measured: int = 0
    """On about how many tokens layers' outputs are compared. A score: with its choice and those of the other scores; 0: not at all.
    A span: with each combination of its layers' sets; 0: on all tokens."""

    def __post_init__(self) -> None:
        check_choices(self)
        if min(self.best, self.span) < 1:
            raise ValueError(f"best={self.best} sets (K) and span={self.span} layers (T) must be at least 1")
        if self.inputs == "progressive" and self.span == 1:
            raise ValueError("inputs='progressive' is for spans of layers that choose together; give span=2 or more")
        check_at_least(self, batch=1, population=2, generations=1, starts=1, measured=0)
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
        """How many members of a generation stay and have children."""
        return round(self.population * self.parents)

    def evaluations(self, experts: int) -> int:
        """About how many subsets of a layer's experts a search compares that does not compare all."""
        return self.population * self.generations if self.method == "genetic" else self.starts * experts**2

    def for_choice(self) -> "Search":
        """Only the options that one layer's choice by NAEE or a score depends on; the others are reset, so that no key has them."""
        if self.method in SCORES:
            return Search(self.method, seed=self.seed, measured=self.measured)
        return Search(ENUMERATE, loss=self.loss, seed=self.seed)

    def for_candidates(self) -> "Search":
        """Only the options that the search for one layer's sets depends on. Raises ValueError for a method that finds no sets."""
        if self.method not in SUBSET_SEARCHES:
            raise ValueError(
                f"method={self.method!r} finds no sets among which layers could choose; choose one of {', '.join(SUBSET_SEARCHES)}"
            )
        return only(self, "best", "seed", *SUBSET_SEARCHES[self.method].options)
