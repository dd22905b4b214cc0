"""Genetic search over the experts of one layer: MoE-I2 (Yang et al., Findings of EMNLP 2024), inter-expert pruning.

It only calls a function from masks to losses. `search` decides what the paper leaves open.
"""

from collections.abc import Callable
from random import Random
from typing import Any

from moeflow.methods.prune.evaluated import Evaluate, Evaluated, enumerate_all
from moeflow.methods.prune.searches import Search
from moeflow.methods.prune.subsets import Subset, Subsets, without

TRIES = 3
"""How many more experts are exchanged in a child that was evaluated before; then a repeat is accepted."""

State = dict[str, Any]
"""The state of a search between two generations, as JSON."""


def search(
    evaluate: Evaluate, subsets: Subsets, how: Search,
    *, layer: int = 0, memoise: bool = True, save: Callable[[State], None] | None = None, resume: State | None = None,
) -> list[tuple[Subset, float]]:  # fmt: skip
    """The best subsets of kept experts that a genetic search finds, with their losses, best first.

    An individual is the set of dropped experts. The best share `how.parents` of a generation stays and has children: a child drops
    a random part of the union of what two different parents drop and, with probability `how.mutation`, one of these experts is
    exchanged for another. The members of a generation differ, and a child that was evaluated before is exchanged further. The first
    generation is drawn at random. If the population could hold all subsets, all are evaluated.

    Every generation has its own random seed (seed, layer, generation). `save` gets the state after every generation; a search that
    gets it back as `resume` continues to the same result. Raises ValueError if `resume` comes from another search.
    """
    experts, population = subsets.experts, how.population
    if subsets.count <= population:
        return enumerate_all(evaluate, subsets, how, layer=layer)
    recipe = {
        "experts": experts, "keep": subsets.keep, "groups": subsets.groups, "protected": sorted(subsets.protected),
        "seed": how.seed, "layer": layer, "population": population, "parents": how.parents, "mutation": how.mutation,
    }  # fmt: skip
    state = resume or {"recipe": recipe, "generation": -1, "people": [], "losses": []}
    if differs := {k: (state["recipe"].get(k), v) for k, v in recipe.items() if state["recipe"].get(k) != v}:
        raise ValueError(f"the state to resume from is another search's (there, here): {differs}; start anew")
    known = [(without(experts, dropped), loss) for dropped, loss in state["losses"]]
    evaluated = Evaluated(evaluate, experts, known, memoise=memoise)
    people: list[Subset] = [tuple(p) for p in state["people"]]
    for generation in range(state["generation"] + 1, how.generations):
        random = Random(f"{how.seed}/{layer}/{generation}")
        if generation:
            people = _next(random, people, how, subsets.pools, {without(experts, kept) for kept in evaluated.loss})
        else:
            people = _first(random, population, subsets)
        losses = evaluated.losses([without(experts, dropped) for dropped in people])
        ranked = sorted(zip(losses, people, strict=True))
        people = [dropped for _, dropped in ranked[: how.survivors]]
        if save is not None:
            dropped_and_loss = [[list(without(experts, kept)), loss] for kept, loss in evaluated.loss.items()]
            save({"recipe": recipe, "generation": generation, "people": [list(p) for p in people], "losses": dropped_and_loss})
    return evaluated.best(how.best, subsets.keep)


def _first(random: Random, population: int, subsets: Subsets) -> list[Subset]:
    """Different random sets of dropped experts."""
    people: dict[Subset, None] = {}
    while len(people) < population:
        people[without(subsets.experts, subsets.draw(random))] = None
    return list(people)


def _next(random: Random, parents: list[Subset], how: Search, pools: list[list[int]], known: set[Subset]) -> list[Subset]:
    """The parents and their children, all different."""
    people = dict.fromkeys(parents)
    while len(people) < how.population:
        one, other = random.sample(parents, 2)
        child = _cross(random, one, other, pools)
        if random.random() < how.mutation:
            child = _exchange(random, child, pools)
        tries = 0
        while child in people or (child in known and tries < TRIES):
            child = _exchange(random, child, pools)
            tries += 1
        people[child] = None
    return list(people)


def _cross(random: Random, one: Subset, other: Subset, pools: list[list[int]]) -> Subset:
    """Draw as many experts as each parent drops from those that either drops, group by group."""
    union = set(one) | set(other)
    drop = len(one) // len(pools)
    return tuple(sorted(e for pool in pools for e in random.sample([e for e in pool if e in union], drop)))


def _exchange(random: Random, dropped: Subset, pools: list[list[int]]) -> Subset:
    """Exchange one dropped expert for a kept one of the same group."""
    gone = set(dropped)
    out = random.choice([e for pool in pools if not gone.issuperset(pool) for e in pool if e in gone])
    pool = next(pool for pool in pools if out in pool)
    into = random.choice([e for e in pool if e not in gone])
    return tuple(sorted(gone - {out} | {into}))
