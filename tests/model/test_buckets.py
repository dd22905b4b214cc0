"""Factors of different ranks lie close together in memory, and each is found again."""

import random

import pytest
import torch

from moeflow.model.buckets import Buckets, Ranks, buckets
from moeflow.model.factors import stacks
from moeflow.model.formats import Format
from moeflow.model.moe import MLP
from moeflow.model.routed_experts import RoutedExperts

DRAWN = random.Random(1)
RANKS: dict[str, Ranks] = {
    "equal": ((375,) * 16,) * 2,
    "one": ((7,),),
    "small": (tuple(DRAWN.randint(1, 85) for _ in range(8)), tuple(DRAWN.randint(1, 85) for _ in range(8))),
    "global": (tuple(DRAWN.randint(100, 700) for _ in range(128)), tuple(DRAWN.randint(100, 700) for _ in range(128))),
    "down": (tuple(DRAWN.randint(64, 512) for _ in range(64)),),
    "ones": ((1,) * 5,),
}


@pytest.mark.parametrize("name", RANKS)
def test_a_parameter_is_hardly_larger_than_its_factors(name: str) -> None:
    ranks = RANKS[name]
    lie = buckets(ranks)
    assert sum(map(sum, ranks)) <= lie.rows <= 1.08 * sum(map(sum, ranks))
    assert sorted(e for bucket in lie.every for e in bucket.experts) == list(range(len(ranks[0])))
    for bucket in lie.every:
        assert list(bucket.experts) == sorted(bucket.experts)
        assert all(of[e] <= rank for of, rank in zip(ranks, bucket.ranks, strict=True) for e in bucket.experts)


def test_large_ranks_are_aligned_and_nearly_equal_ones_share_a_bucket() -> None:
    assert all(buckets(RANKS[name]).aligned for name in ("equal", "global", "down"))
    assert not buckets(RANKS["small"]).aligned
    assert len(buckets(RANKS["equal"]).every) == 1 and len(buckets(RANKS["down"]).every) <= 24


@pytest.mark.parametrize("name", ["small", "global", "down"])
def test_stacks_of_buckets_and_factors_of_experts_are_the_same_numbers(name: str) -> None:
    lie, ranks, columns = buckets(RANKS[name]), RANKS[name], 3
    rows = torch.arange(lie.rows * columns).view(lie.rows, columns)
    first, second = lie.first_of(rows), lie.second_of(rows)
    for bucket, first_ERN, second_EMR in zip(lie.every, lie.first(rows), lie.second(rows), strict=True):
        for at, e in enumerate(bucket.experts):
            assert torch.equal(first[e], first_ERN[at])
            assert all(torch.equal(s.view(columns, -1), t[at]) for s, t in zip(second[e], second_EMR, strict=True))
            assert len(second[e]) == len(ranks)
            first_rows, second_rows = lie.spans[e]
            assert torch.equal(first[e], rows[first_rows])
            assert all(torch.equal(s, rows[now]) for s, now in zip(second[e], second_rows, strict=True))
    everything = torch.cat([t.flatten() for t in first]).sort().values
    assert torch.equal(everything, rows.flatten()), "every row is one expert's"


@pytest.mark.parametrize("tokens", [1, 30])
def test_experts_of_uneven_ranks_compute_what_each_alone_does(tokens: int) -> None:
    low, some = (3, 40, 17, 64, 9, 33), (5, 0, 31, 64, 0, 8)
    format = Format(6, some, tuple(2 * r for r in some), low)
    experts, draw = RoutedExperts(format, 24, 20, torch.nn.functional.silu), torch.Generator().manual_seed(0)
    mlps: list[MLP] = []
    with torch.no_grad():
        for stack in stacks(format):
            for _, _, piece_MN in stack.pieces(getattr(experts, stack.name), format):
                piece_MN.copy_(torch.randn(piece_MN.shape, generator=draw) * 0.2)
        mlps = list(experts.mlps("silu"))
        x_TD = torch.randn(tokens, 24, generator=draw)
        index_Tk = torch.rand(tokens, 6, generator=draw).topk(3).indices
        weights_Tk = torch.rand(tokens, 3, generator=draw)
        expected_TD = torch.stack(
            [
                sum(w * mlps[e](x[None])[0] for e, w in zip(es, ws, strict=True))
                for x, es, ws in zip(x_TD, index_Tk.tolist(), weights_Tk, strict=True)
            ]
        )
        torch.testing.assert_close(experts(x_TD, index_Tk, weights_Tk), expected_TD)
    resident = sum(p.numel() for p in experts.parameters())
    at_rest = sum(p.numel() for stack in stacks(format) for _, _, p in stack.pieces(getattr(experts, stack.name), format))
    assert at_rest <= resident <= 1.08 * at_rest
    kinds = [type(b) for b in experts.buckets.values()]
    assert kinds == [Buckets, Buckets]
