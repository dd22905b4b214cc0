"""What single experts are scored by, and that the table of scores says what each needs."""

import pytest
import torch

from moeflow.methods.graph import load
from moeflow.methods.prune.searches import Search
from moeflow.methods.scores import DROP_SCORES, SCORES
from moeflow.methods.scores.functions import aimer, baselines, best_by_score, reap
from moeflow.model.moe import MLP, MoELayer
from tests.layers import layer


def test_the_best_by_score_stay_and_the_lower_number_wins_a_tie() -> None:
    assert best_by_score(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0]), 2) == [1, 2]
    assert best_by_score(torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0, 3.0]), 4, groups=2) == [0, 1, 4, 5]


def test_reap_is_the_mean_over_routed_tokens_and_an_unreached_expert_scores_nothing() -> None:
    stats = {"reap_E": torch.tensor([6.0, 4.0, 0.0]), "count_E": torch.tensor([3.0, 1.0, 0.0])}
    assert reap(None, stats, 0).tolist() == [2.0, 4.0, 0.0]


def test_aimer_prefers_the_expert_whose_weights_are_less_even() -> None:
    moe = layer(2)
    flat = MLP(*(torch.ones_like(t) for t in (moe.experts[0].gate_FD, moe.experts[0].up_FD, moe.experts[0].down_DF)))
    uneven = MoELayer(moe.router, moe.router_ED, (flat, moe.experts[1]))
    score_E = aimer(uneven, {}, 0)
    assert float(score_E[0]) == pytest.approx(-1.0) and score_E[1] > score_E[0]


@pytest.mark.parametrize("name", DROP_SCORES)
def test_a_row_of_the_table_names_all_that_its_score_reads(name: str) -> None:
    score, moe = DROP_SCORES[name], layer(8)
    recorded = {n: torch.rand(8) for n in ("score_E", "weight_E", "reap_E")}
    recorded |= {"count_E": torch.arange(8.0), "tokens": torch.tensor(20.0)}
    needed = {n: recorded[n] for n in score.needs}
    score_E = load(score.code)(moe if score.weights else None, needed, 3)
    assert score_E.shape == (8,) and torch.equal(score_E, load(score.code)(moe, recorded, 3))
    if name in SCORES:
        assert baselines(moe, recorded, 3, 5)[name] == tuple(best_by_score(score_E, 5))


def test_an_unknown_score_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="method='luck' is not known; choose one of .*random, frequency, .*, aimer"):
        Search("luck")
