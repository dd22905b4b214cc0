"""What the searches over subsets of experts promise, on layers small enough to know the answer."""

import inspect
import json
from dataclasses import fields, replace
from random import Random

import pytest
import torch
from torch import Tensor

from benchmarks.genetic import planted
from moeflow.arch import Arch
from moeflow.methods.graph import load
from moeflow.methods.prune import genetic, swap
from moeflow.methods.prune.evaluated import Evaluate, Evaluated, enumerate_all
from moeflow.methods.prune.gram import Weighed
from moeflow.methods.prune.searches import SUBSET_SEARCHES, Search
from moeflow.methods.prune.subsets import Subset, Subsets
from tests.layers import NAMES, layer

SEARCHES = {"enumerate": enumerate_all, "genetic": genetic.search, "swap": swap.search}


def every(evaluate: Evaluate, subsets: Subsets, best: int = 1) -> list[tuple[Subset, float]]:
    return enumerate_all(evaluate, subsets, Search("enumerate", best=best), layer=0)


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
        how = Search("genetic", seed=seed, population=16, generations=24, parents=0.25, best=1)
        [(subset, loss)] = genetic.search(layer_16, Subsets(16, 12), how)
        assert layer_16.asked <= 300
        [(optimum, least)] = every(layer_16.evaluate, Subsets(16, 12))
        assert loss >= least * (1 - 1e-6)
        hits += subset == optimum
    assert hits >= 18


def test_the_genetic_search_beats_as_many_random_draws_on_every_planted_layer() -> None:
    for seed in range(20):
        layer_32 = Counted(weighed(32, seed, 24))
        how = Search("genetic", seed=seed, population=50, generations=20, best=1)
        [(_, loss)] = genetic.search(layer_32, Subsets(32, 8), how)
        random, drawn = Random(seed), Evaluated(layer_32.evaluate, 32)
        drawn.losses([Subsets(32, 8).draw(random) for _ in range(layer_32.asked)])
        assert loss < drawn.best(1, 8)[0][1]


def test_the_swap_search_is_as_good_as_the_genetic_one_for_as_many_evaluations() -> None:
    """Pairs of experts replace each other; the neighbours that the swap search looks at count as evaluated."""
    for seed in range(6):
        layer_16 = Counted(weighed(16, seed, 4))
        ours = swap.search(layer_16, Subsets(16, 12), Search("swap", seed=seed, starts=2, best=1))[0][1]
        spent, state = layer_16.asked, {}
        how = Search("genetic", seed=seed, population=20, generations=60)
        genetic.search(layer_16, Subsets(16, 12), how, save=state.update)
        theirs = min(loss for _, loss in state["losses"][:spent])
        assert ours <= theirs * (1 + 1e-6)


def test_the_swap_search_needs_no_evaluation_for_what_it_can_add_up() -> None:
    """With a prepared layer and with any function it descends the same way."""
    for seed in range(3):
        prepared = weighed(32, seed, 16, top_k=4)
        how = Search("swap", seed=seed, starts=3)
        fast = swap.search(prepared, Subsets(32, 16), how)
        slow = swap.search(Counted(prepared), Subsets(32, 16), how)
        assert [s for s, _ in fast] == [s for s, _ in slow]


@pytest.mark.parametrize("killed_after", [100, 250, 700])
def test_a_search_killed_in_the_middle_goes_on_to_the_same_result(killed_after: int) -> None:
    """Its state survives as JSON, and nothing that was finished is evaluated again."""
    evaluate, states = weighed(32, 0, 16), []
    subsets, how = Subsets(32, 16), Search("genetic", seed=7, population=60, generations=20, best=5)
    whole = Counted(evaluate)
    expected = genetic.search(whole, subsets, how, layer=3)
    doomed = Counted(evaluate, at_most=killed_after)
    with pytest.raises(KeyboardInterrupt):
        genetic.search(doomed, subsets, how, layer=3, save=lambda state: states.append(json.dumps(state)))
    rest = Counted(evaluate)
    assert genetic.search(rest, subsets, how, layer=3, resume=json.loads(states[-1])) == expected
    assert len(json.loads(states[-1])["losses"]) + rest.asked == whole.asked
    with pytest.raises(ValueError, match=r"another search's .*'seed': \(7, 8\)"):
        genetic.search(rest, subsets, replace(how, seed=8), layer=3, resume=json.loads(states[-1]))


def test_a_search_is_its_seed_and_its_layer() -> None:
    evaluate = weighed(32, 0, 16)
    first, again, other, above = (
        genetic.search(evaluate, Subsets(32, 16), Search("genetic", seed=s, population=20, generations=2), layer=i)
        for s, i in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert first == again and other != first != above


def test_without_memory_a_generation_is_evaluated_whole() -> None:
    evaluate = weighed(16, 0, 4)
    remembers, forgets = Counted(evaluate), Counted(evaluate)
    subsets, how = Subsets(16, 12), Search("genetic", population=30, generations=12)
    with_memory = genetic.search(remembers, subsets, how)
    without = genetic.search(forgets, subsets, how, memoise=False)
    assert [s for s, _ in with_memory] == [s for s, _ in without]
    assert forgets.asked == 30 * 12 > remembers.asked


@pytest.mark.parametrize("name", ["genetic", "swap"])
def test_where_there_are_few_subsets_all_are_evaluated(name: str) -> None:
    """A layer of six experts has six subsets of five: no population of a hundred waits for more."""
    evaluate = Counted(weighed(6, 0, 4))
    assert SEARCHES[name](evaluate, Subsets(6, 5), Search(name, best=10), layer=0) == every(evaluate.evaluate, Subsets(6, 5), 10)
    assert [subset for subset, _ in SEARCHES[name](evaluate, Subsets(6, 6), Search(name), layer=0)] == [(0, 1, 2, 3, 4, 5)]


@pytest.mark.parametrize("name", SEARCHES)
def test_the_best_subsets_differ_and_come_in_order(name: str) -> None:
    evaluate = weighed(16, 3, 4)
    results = SEARCHES[name](evaluate, Subsets(16, 12), Search(name, best=5), layer=0)
    assert len({subset for subset, _ in results}) == 5
    assert [loss for _, loss in results] == sorted(loss for _, loss in results)
    assert results == every(evaluate, Subsets(16, 12), 5) or name != "enumerate"
    for subset, loss in results:
        mask_SE = torch.zeros(1, 16, dtype=torch.bool).scatter_(1, torch.tensor([subset]), True)
        assert float(evaluate(mask_SE)) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("name", SEARCHES)
def test_every_group_keeps_as_many_and_the_protected_stay(name: str) -> None:
    """A group-limited router, on which the genetic search and the swap search find what enumeration finds."""
    arch = Arch(model_type="groups", groups=True, normalize="never", **NAMES)
    moe = layer(12, 2, arch, groups=3, topk_groups=1, normalize=False)
    evaluate = Counted(Weighed.of(moe, [torch.randn(200, 8, generator=torch.Generator().manual_seed(0))]))
    best = every(evaluate, Subsets(12, 6, 3))[0][0]
    protected = tuple(e for e in range(4) if e not in best)[:1]
    subsets = Subsets(12, 6, 3, protected)
    results = SEARCHES[name](evaluate.evaluate, subsets, Search(name, best=4), layer=0)
    for subset, _ in results:
        assert set(protected) <= set(subset)
        assert [sum(e // 4 == g for e in subset) for g in range(3)] == [2, 2, 2]
    assert results[0][0] == every(evaluate, subsets)[0][0]


def test_a_subset_to_begin_at_is_where_the_search_begins() -> None:
    evaluate = weighed(16, 1, 8)
    optimum, how = every(evaluate, Subsets(16, 8))[0][0], Search("swap", starts=1, best=1)
    assert swap.search(evaluate, Subsets(16, 8), how, begin=[optimum])[0][0] == optimum
    with pytest.raises(ValueError, match=r"\[0, 1, 2\] does not keep 8 of 16"):
        swap.search(evaluate, Subsets(16, 8), how, begin=[(0, 1, 2)])


def test_a_loss_that_is_no_number_ends_the_search() -> None:
    with pytest.raises(ValueError, match="NaN or infinite; compute in another precision"):
        genetic.search(lambda mask_SE: torch.full((len(mask_SE),), torch.nan), Subsets(16, 8), Search("genetic"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(best=0), r"best=0 sets \(K\) and span=1 layers \(T\) must be at least 1"),
        (dict(population=1), "population=1 must be at least 2"),
        (dict(generations=0), "generations=0 must be at least 1"),
        (dict(parents=1.5), "parents=1.5 .* between 0 and 1"),
        (dict(parents=0.01), "parents=0.01 of population=100 must be two at least"),
        (dict(mutation=-0.1), "mutation=-0.1 .* between 0 and 1"),
        (dict(starts=0), "starts=0 must be at least 1"),
        (dict(loss="l1"), "loss='l1' is not known; choose one of frobenius, batch-sum"),
        (dict(inputs="mixed"), "inputs='mixed' is not known; choose one of original, progressive"),
        (dict(inputs="progressive"), "inputs='progressive' is for spans of layers that choose together; give span=2 or more"),
        (
            dict(method="annealing"),
            "method='annealing' is not known; choose one of layerwise, progressive, enumerate, genetic, swap, random, frequency",
        ),
    ],
)
def test_an_option_out_of_its_range_is_one_line(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        Search(**dict(method="genetic") | wrong)
    assert "\n" not in str(raised.value)


def test_a_step_is_told_only_the_options_that_it_reads() -> None:
    """Otherwise another T would search again, and the genetic search's population would search by swaps again."""
    how = Search("swap", seed=3, best=2, span=4, inputs="progressive", population=10, starts=5, loss="batch-sum")
    assert how.for_candidates() == Search("swap", seed=3, best=2, starts=5)
    assert replace(how, method="genetic").for_candidates() == Search("genetic", seed=3, best=2, population=10)
    assert replace(how, method="progressive").for_choice() == Search("enumerate", seed=3, loss="batch-sum")
    with pytest.raises(ValueError, match="method='reap' finds no sets .*; choose one of enumerate, genetic, swap"):
        Search("reap").for_candidates()


@pytest.mark.parametrize("name", SUBSET_SEARCHES)
def test_a_row_of_the_table_names_its_options_and_its_code(name: str) -> None:
    row, taken = SUBSET_SEARCHES[name], inspect.signature(load(SUBSET_SEARCHES[name].code)).parameters
    assert set(row.options) <= {f.name for f in fields(Search)}
    assert (row.begins, row.resumes) == ("begin" in taken, {"save", "resume"} <= set(taken))
    [(subset, _)] = load(row.code)(weighed(6, 0, 2), Subsets(6, 4), Search(name, best=1), layer=0)
    assert len(subset) == 4
