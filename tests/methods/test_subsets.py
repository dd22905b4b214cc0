"""Which subsets there are, what each costs, and what single experts are scored by."""

from itertools import combinations

import pytest
import torch

from moeflow.arch import FAMILIES, Arch
from moeflow.methods.prune.errors import mask_of, squared_errors, squared_errors_direct
from moeflow.methods.prune.subsets import all_subsets, count_subsets
from moeflow.methods.records import CRITERIA
from moeflow.methods.scores import SCORES, aimer, best_by_score, reap
from moeflow.model.moe import MLP, MoELayer
from tests.layers import layer


def test_all_subsets_are_there_once_and_the_last_experts_stay_first() -> None:
    """The authors' code goes through the dropped sets in lexical order, so that the first of equal subsets is theirs."""
    subsets = list(all_subsets(5, 3))
    assert sorted(subsets) == sorted(combinations(range(5), 3)) and len(subsets) == count_subsets(5, 3)
    assert subsets[0] == (2, 3, 4) and subsets[-1] == (0, 1, 2)


@pytest.mark.parametrize("arch", FAMILIES, ids=lambda a: a.model_type)
def test_the_gram_identity_is_the_direct_error_for_every_router(arch: Arch) -> None:
    groups = {"groups": 2, "topk_groups": 1} if arch.groups else {}
    bias = {"bias_E": torch.linspace(-0.2, 0.2, 8)} if arch.router_bias else {}
    moe = layer(8, 2, arch, normalize=arch.normalize != "never", scale=1.5 if arch.groups else 1.0, jitter=0.01, **groups, **bias)
    x_TD = torch.randn(80, 8, generator=torch.Generator().manual_seed(1))
    mask_SE = mask_of(list(all_subsets(8, 6, groups.get("groups", 1))), 8)
    fast, norm = squared_errors(moe, x_TD, mask_SE)
    slow, same = squared_errors_direct(moe, x_TD, mask_SE)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6 * float(norm))
    torch.testing.assert_close(norm, same, rtol=1e-4, atol=0.0)
    assert int(fast.argmin()) == int(slow.argmin())


def test_a_target_from_elsewhere_is_one_more_vector() -> None:
    moe, other = layer(), layer(seed=5)
    x_TD = torch.randn(50, 8)
    mask_SE = mask_of(list(all_subsets(6, 4)), 6)
    fast, norm = squared_errors(moe, x_TD, mask_SE, other(x_TD))
    slow, same = squared_errors_direct(moe, x_TD, mask_SE, other(x_TD))
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm, same)


def test_keeping_all_experts_costs_nothing() -> None:
    error_S, _ = squared_errors(layer(), torch.randn(40, 8), mask_of([tuple(range(6))], 6))
    assert error_S.tolist() == [0.0]


def test_errors_do_not_depend_on_how_tokens_are_split() -> None:
    moe, x_TD, mask_SE = layer(), torch.randn(1500, 8), mask_of(list(all_subsets(6, 4)), 6)
    parts = [squared_errors(moe, part, mask_SE)[0] for part in x_TD.split(7)]
    torch.testing.assert_close(torch.stack(parts).sum(0), squared_errors(moe, x_TD, mask_SE)[0])


def test_an_expert_that_no_token_reaches_costs_nothing_to_drop() -> None:
    moe, x_TD = layer(), torch.randn(64, 8).abs()
    moe.router_ED[3] = -100
    errors_S, _ = squared_errors(moe, x_TD, mask_of([(0, 1, 2, 4, 5), (1, 2, 3, 4, 5)], 6))
    assert errors_S[0] == 0 < errors_S[1]


def test_the_best_by_score_stay_and_the_lower_number_wins_a_tie() -> None:
    assert best_by_score(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0]), 2) == [1, 2]
    assert best_by_score(torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0, 3.0]), 4, groups=2) == [0, 1, 4, 5]


def test_reap_is_the_mean_over_routed_tokens_and_an_unreached_expert_scores_nothing() -> None:
    stats = {"reap_E": torch.tensor([6.0, 4.0, 0.0]), "count_E": torch.tensor([3.0, 1.0, 0.0])}
    assert reap(layer(3), stats, 0).tolist() == [2.0, 4.0, 0.0]


def test_aimer_prefers_the_expert_whose_weights_are_less_even() -> None:
    moe = layer(2)
    flat = MLP(*(torch.ones_like(t) for t in (moe.experts[0].gate_FD, moe.experts[0].up_FD, moe.experts[0].down_DF)))
    uneven = MoELayer(moe.router, moe.router_ED, (flat, moe.experts[1]))
    score_E = aimer(uneven, {}, 0)
    assert float(score_E[0]) == pytest.approx(-1.0) and score_E[1] > score_E[0]


def test_the_graph_knows_the_criteria_by_the_names_that_have_a_score() -> None:
    assert tuple(SCORES) == CRITERIA
