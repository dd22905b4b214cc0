"""Which subsets there are, and what each costs."""

from itertools import combinations
from math import comb
from random import Random
from typing import Any

import pytest
import torch

from moeflow.arch import Arch
from moeflow.methods.prune.errors import mask_of, squared_errors, squared_errors_by_expert
from moeflow.methods.prune.subsets import Subsets
from tests.layers import NAMES, layer, squared_errors_direct


def test_all_subsets_are_there_once_and_the_last_experts_stay_first() -> None:
    """The authors' code goes through the dropped sets in lexical order, so that the first of equal subsets is theirs."""
    subsets = list(Subsets(5, 3))
    assert sorted(subsets) == sorted(combinations(range(5), 3)) and len(subsets) == Subsets(5, 3).count
    assert subsets[0] == (2, 3, 4) and subsets[-1] == (0, 1, 2)


ROUTERS: dict[str, dict[str, Any]] = {
    "weights that sum to one": {"normalize": "always"},
    "weights as they are": {"normalize": "never"},
    "sparsemixer": {"score": "sparsemixer", "normalize": "never"},
    "groups by their best": {"groups": True, "group_score": "max", "normalize": "never"},
    "sigmoid, groups by two, a bias": {"score": "sigmoid", "groups": True, "group_score": "top2", "router_bias": "bias"},
}


@pytest.mark.parametrize("how", ROUTERS.values(), ids=ROUTERS)
def test_the_gram_identity_is_the_direct_error_for_every_router(how: dict[str, Any]) -> None:
    arch = Arch(model_type="any", **NAMES, **how)
    groups = {"groups": 2, "topk_groups": 1} if arch.groups else {}
    bias = {"bias_E": torch.linspace(-0.2, 0.2, 8)} if arch.router_bias else {}
    moe = layer(8, 2, arch, normalize=arch.normalize != "never", scale=1.5 if arch.groups else 1.0, jitter=0.01, **groups, **bias)
    x_TD = torch.randn(80, 8, generator=torch.Generator().manual_seed(1))
    mask_SE = mask_of(list(Subsets(8, 6, groups.get("groups", 1))), 8)
    fast, norm = squared_errors(moe, x_TD, mask_SE)
    slow, same = squared_errors_direct(moe, x_TD, mask_SE)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6 * float(norm))
    torch.testing.assert_close(norm, same, rtol=1e-4, atol=0.0)
    assert int(fast.argmin()) == int(slow.argmin())
    summed, also = squared_errors_by_expert(moe, x_TD, mask_SE)
    torch.testing.assert_close(summed, slow, rtol=1e-4, atol=1e-6 * float(norm))
    torch.testing.assert_close(also, same, rtol=1e-4, atol=0.0)


def test_a_target_from_elsewhere_is_one_more_vector() -> None:
    moe, other = layer(), layer(seed=5)
    x_TD = torch.randn(50, 8)
    mask_SE = mask_of(list(Subsets(6, 4)), 6)
    fast, norm = squared_errors(moe, x_TD, mask_SE, other(x_TD))
    slow, same = squared_errors_direct(moe, x_TD, mask_SE, other(x_TD))
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm, same)
    summed, also = squared_errors_by_expert(moe, x_TD, mask_SE, other(x_TD))
    torch.testing.assert_close(summed, slow, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(also, same)


def test_keeping_all_experts_costs_nothing() -> None:
    error_S, _ = squared_errors(layer(), torch.randn(40, 8), mask_of([tuple(range(6))], 6))
    assert error_S.tolist() == [0.0]


def test_errors_do_not_depend_on_how_tokens_are_split() -> None:
    moe, x_TD, mask_SE = layer(), torch.randn(1500, 8), mask_of(list(Subsets(6, 4)), 6)
    parts = [squared_errors(moe, part, mask_SE)[0] for part in x_TD.split(7)]
    torch.testing.assert_close(torch.stack(parts).sum(0), squared_errors(moe, x_TD, mask_SE)[0])


def test_an_expert_that_no_token_reaches_costs_nothing_to_drop() -> None:
    moe, x_TD = layer(), torch.randn(64, 8).abs()
    moe.router_ED[3] = -100
    errors_S, _ = squared_errors(moe, x_TD, mask_of([(0, 1, 2, 4, 5), (1, 2, 3, 4, 5)], 6))
    assert errors_S[0] == 0 < errors_S[1]


def test_draws_and_counts_know_groups_and_protection() -> None:
    subsets = Subsets(8, 4, 2, (1, 6))
    assert len(set(subsets)) == len(list(subsets)) == subsets.count == comb(3, 2) ** 2
    random = Random(0)
    assert {subsets.draw(random) for _ in range(500)} == set(subsets)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(keep=0), "keep=0 must lie between 1 and the layer's 16"),
        (dict(keep=17), "keep=17 must lie between"),
        (dict(keep=9, groups=2), "keep=9 of 16 .* groups=2"),
        (dict(protected=(16,)), r"protected=\[16\] must be different experts between 0 and 15"),
        (dict(keep=4, groups=2, protected=(0, 1, 2)), "3 experts are protected where keep=4 leaves 2 in each of 2 groups"),
    ],
)
def test_subsets_of_which_there_are_none_are_refused_in_one_line(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        Subsets(16, **dict(keep=12) | wrong)
    assert "\n" not in str(raised.value)
