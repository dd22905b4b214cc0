"""What the searches over subsets of experts promise, on layers small enough to know the answer."""

import json
from math import comb
from random import Random

import pytest
import torch
from torch import Tensor

from benchmarks.genetic import planted
from moeflow.arch.deepseek import DEEPSEEK_V2
from moeflow.methods.prune import genetic, swap
from moeflow.methods.prune.evaluated import Found, enumerate_all
from moeflow.methods.prune.gram import Weighed
from moeflow.methods.prune.subsets import all_subsets, check, count_subsets, draw
from tests.layers import layer

SEARCHES = [enumerate_all, genetic.search, swap.search]


def weighed(experts: int, seed: int, drop: int, *, top_k: int = 2, tokens: int = 256) -> Weighed:
    x_TD = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))
    return Weighed.of(planted(experts, seed, top_k=top_k), [x_TD], drop_at_most=drop)


class Counted:
    """A layer that counts the subsets it is asked for, and may die of the last."""

    def __init__(self, evaluate: Weighed, at_most: int | None = None) -> None:
        self.evaluate, self.at_most, self.asked = evaluate, at_most, 0

    def __call__(self, mask_SE: Tensor) -> Tensor:
        self.asked += len(mask_SE)
        if self.at_most is not None and self.asked > self.at_most:
            raise KeyboardInterrupt
        return self.evaluate(mask_SE)


def test_the_genetic_search_finds_the_optimum_of_1820_subsets_with_300_evaluations() -> None:
    hits = 0
    for seed in range(20):
        layer_16 = Counted(weighed(16, seed, 4))
        [(found, loss)] = genetic.search(layer_16, 16, 12, seed=seed, population=16, generations=24, parents=0.25, best=1)
        assert layer_16.asked <= 300
        [(optimum, least)] = enumerate_all(layer_16.evaluate, 16, 12)
        assert loss >= least * (1 - 1e-6)
        hits += found == optimum
    assert hits >= 18


def test_the_genetic_search_beats_as_many_random_draws_on_every_planted_layer() -> None:
    for seed in range(20):
        layer_32 = Counted(weighed(32, seed, 24))
        [(_, loss)] = genetic.search(layer_32, 32, 8, seed=seed, population=50, generations=20, best=1)
        random, drawn = Random(seed), Found(layer_32.evaluate, 32)
        drawn.losses([draw(random, 32, 8) for _ in range(layer_32.asked)])
        assert loss < drawn.best(1, 8)[0][1]


def test_the_swap_search_is_as_good_as_the_genetic_one_for_as_many_evaluations() -> None:
    """Pairs of experts replace each other; the neighbours that the swap search looks at count as evaluated."""
    for seed in range(6):
        layer_16 = Counted(weighed(16, seed, 4))
        ours = swap.search(layer_16, 16, 12, seed=seed, starts=2, best=1)[0][1]
        spent, state = layer_16.asked, {}
        genetic.search(layer_16, 16, 12, seed=seed, population=20, generations=60, save=state.update)
        theirs = min(loss for _, loss in state["found"][:spent])
        assert ours <= theirs * (1 + 1e-6)


def test_the_swap_search_needs_no_evaluation_for_what_it_can_add_up() -> None:
    """With a prepared layer and with any function it descends the same way."""
    for seed in range(3):
        prepared = weighed(32, seed, 16, top_k=4)
        fast = swap.search(prepared, 32, 16, seed=seed, starts=3)
        slow = swap.search(Counted(prepared), 32, 16, seed=seed, starts=3)
        assert [s for s, _ in fast] == [s for s, _ in slow]


@pytest.mark.parametrize("killed_after", [100, 250, 700])
def test_a_search_killed_in_the_middle_goes_on_to_the_same_result(killed_after: int) -> None:
    """Its state survives as JSON, and nothing that was finished is evaluated again."""
    evaluate, states = weighed(32, 0, 16), []
    arguments = dict(seed=7, layer=3, population=60, generations=20, best=5)
    whole = Counted(evaluate)
    expected = genetic.search(whole, 32, 16, **arguments)
    doomed = Counted(evaluate, at_most=killed_after)
    with pytest.raises(KeyboardInterrupt):
        genetic.search(doomed, 32, 16, save=lambda state: states.append(json.dumps(state)), **arguments)
    rest = Counted(evaluate)
    assert genetic.search(rest, 32, 16, resume=json.loads(states[-1]), **arguments) == expected
    assert len(json.loads(states[-1])["found"]) + rest.asked == whole.asked
    with pytest.raises(ValueError, match=r"another search's .*'seed': \(7, 8\)"):
        genetic.search(rest, 32, 16, resume=json.loads(states[-1]), **arguments | {"seed": 8})


def test_a_search_is_its_seed_and_its_layer() -> None:
    evaluate = weighed(32, 0, 16)
    first, again, other, above = (
        genetic.search(evaluate, 32, 16, seed=s, layer=i, population=20, generations=2) for s, i in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert first == again and other != first != above


def test_without_memory_a_generation_is_evaluated_whole() -> None:
    evaluate = weighed(16, 0, 4)
    remembers, forgets = Counted(evaluate), Counted(evaluate)
    arguments = dict(population=30, generations=12)
    with_memory = genetic.search(remembers, 16, 12, **arguments)
    without = genetic.search(forgets, 16, 12, memoise=False, **arguments)
    assert [s for s, _ in with_memory] == [s for s, _ in without]
    assert forgets.asked == 30 * 12 > remembers.asked


@pytest.mark.parametrize("search", [genetic.search, swap.search])
def test_where_there_are_few_subsets_all_are_evaluated(search) -> None:  # type: ignore[no-untyped-def]
    """A layer of six experts has six subsets of five: no population of a hundred waits for more."""
    evaluate = Counted(weighed(6, 0, 4))
    assert search(evaluate, 6, 5, best=10) == enumerate_all(evaluate.evaluate, 6, 5, best=10)
    assert [subset for subset, _ in search(evaluate, 6, 6)] == [(0, 1, 2, 3, 4, 5)]


@pytest.mark.parametrize("search", SEARCHES)
def test_the_best_subsets_differ_and_come_in_order(search) -> None:  # type: ignore[no-untyped-def]
    evaluate = weighed(16, 3, 4)
    found = search(evaluate, 16, 12, best=5)
    assert len({subset for subset, _ in found}) == 5
    assert [loss for _, loss in found] == sorted(loss for _, loss in found)
    assert found == enumerate_all(evaluate, 16, 12, best=5) or search is not enumerate_all
    for subset, loss in found:
        mask_SE = torch.zeros(1, 16, dtype=torch.bool).scatter_(1, torch.tensor([subset]), True)
        assert float(evaluate(mask_SE)) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("search", SEARCHES)
def test_every_group_keeps_as_many_and_the_protected_stay(search) -> None:  # type: ignore[no-untyped-def]
    """A group-limited router, on which the genetic search and the swap search find what enumeration finds."""
    moe = layer(12, 2, DEEPSEEK_V2, groups=3, topk_groups=1, normalize=False)
    evaluate = Counted(Weighed.of(moe, [torch.randn(200, 8, generator=torch.Generator().manual_seed(0))]))
    protected = [e for e in range(4) if e not in (kept := enumerate_all(evaluate, 12, 6, groups=3)[0][0])][:1]
    assert protected and kept
    found = search(evaluate.evaluate, 12, 6, groups=3, protected=protected, best=4)
    for subset, _ in found:
        assert set(protected) <= set(subset)
        assert [sum(e // 4 == g for e in subset) for g in range(3)] == [2, 2, 2]
    assert found[0][0] == enumerate_all(evaluate, 12, 6, groups=3, protected=protected)[0][0]


def test_elimination_gives_every_count_its_subset_and_exchanges_only_improve_it() -> None:
    evaluate = weighed(16, 1, 14)
    plain, refined = swap.nested(evaluate, 16, 2, refine=False, protected=[5]), swap.nested(evaluate, 16, 2, protected=[5])
    assert list(plain) == list(refined) == list(range(16, 1, -1))
    for keep in range(15, 1, -1):
        assert set(plain[keep][0]) < set(plain[keep + 1][0]) and 5 in plain[keep][0]
        assert len(refined[keep][0]) == keep and 5 in refined[keep][0]
    assert sum(loss for _, loss in refined.values()) <= sum(loss for _, loss in plain.values())
    for keep in (12, 8, 3):
        assert refined[keep][1] <= 1.02 * enumerate_all(evaluate, 16, keep, protected=[5])[0][1]
    moe = layer(12, 2, DEEPSEEK_V2, groups=3, topk_groups=1, normalize=False)
    grouped = swap.nested(Weighed.of(moe, [torch.randn(100, 8)]), 12, 6, groups=3)
    assert {n: [sum(e // 4 == g for e in s) for g in range(3)] for n, (s, _) in grouped.items()} == {
        12: [4, 4, 4],
        9: [3, 3, 3],
        6: [2, 2, 2],
    }


def test_a_subset_to_begin_at_is_where_the_search_begins() -> None:
    evaluate = weighed(16, 1, 8)
    optimum = enumerate_all(evaluate, 16, 8)[0][0]
    assert swap.search(evaluate, 16, 8, starts=1, given=[optimum], best=1)[0][0] == optimum
    with pytest.raises(ValueError, match=r"\[0, 1, 2\] does not keep 8 of 16"):
        swap.search(evaluate, 16, 8, given=[(0, 1, 2)])


def test_a_loss_that_is_no_number_ends_the_search() -> None:
    with pytest.raises(ValueError, match="NaN or infinite; compute in another precision"):
        genetic.search(lambda mask_SE: torch.full((len(mask_SE),), torch.nan), 16, 8)


def test_draws_and_counts_know_groups_and_protection() -> None:
    subsets = list(all_subsets(8, 4, 2, protected=[1, 6]))
    assert len(set(subsets)) == len(subsets) == count_subsets(8, 4, 2, [1, 6]) == comb(3, 2) ** 2
    random = Random(0)
    assert {draw(random, 8, 4, 2, [1, 6]) for _ in range(500)} == set(subsets)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (dict(keep=0), "keep=0 must lie between 1 and the layer's 16"),
        (dict(keep=17), "keep=17 must lie between"),
        (dict(keep=9, groups=2), "keep=9 of 16 .* groups=2"),
        (dict(protected=[16]), r"protected=\[16\] must be different experts between 0 and 15"),
        (dict(keep=4, groups=2, protected=[0, 1, 2]), "3 experts are protected where keep=4 leaves 2 in each of 2 groups"),
        (dict(best=0), "best=0 must be at least 1"),
        (dict(population=1), "population=1 must be at least 2"),
        (dict(generations=0), "generations=0 must be at least 1"),
        (dict(parents=1.5), "parents=1.5 .* between 0 and 1"),
        (dict(parents=0.01), "parents=0.01 of population=100 must be two at least"),
        (dict(mutation=-0.1), "mutation=-0.1 .* between 0 and 1"),
        (dict(starts=0), "starts=0 must be at least 1"),
    ],
)
def test_a_parameter_out_of_its_range_is_one_line(wrong: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told) as raised:
        check(16, **dict(keep=12) | wrong)
    assert "\n" not in str(raised.value)
