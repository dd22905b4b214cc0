"""Rows and steps: which sequences a step sees depends on the seed alone, and rates and divergence on the step's number."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from moeflow.methods.finetune.batches import batch_of, dealt
from moeflow.methods.finetune.curve import Curve
from moeflow.methods.finetune.recipe import divisors
from moeflow.methods.finetune.teacher import Likeliest, Whole
from tests.recipes import RECIPE


def test_every_row_comes_once_before_any_comes_again_and_each_time_in_another_order() -> None:
    order = np.concatenate([batch_of(step, 4, 10, seed=3) for step in range(5)])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert list(order[:10]) != list(order[10:])
    assert list(order) == list(np.concatenate([batch_of(step, 5, 10, seed=3) for step in range(4)])), "whatever the batch"
    assert list(batch_of(0, 25, 10, seed=3)[:10]) == list(order[:10]), "a batch may be larger than the data"


def test_any_number_of_processes_takes_the_same_rows() -> None:
    rows = np.arange(24)
    for processes in divisors(24):
        for micro in divisors(24 // processes):
            parts = [dealt(rows, rank, processes, micro) for rank in range(processes)]
            assert {len(p) for part in parts for p in part} == {micro}
            assert sorted(np.concatenate([p for part in parts for p in part])) == list(rows)
            assert len({len(part) for part in parts}) == 1


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    rates = [RECIPE.rate_at(step) / RECIPE.rate for step in range(RECIPE.steps)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates[3 + 97 // 2] == pytest.approx((1 + math.cos(math.pi * 48 / 97)) / 2)
    assert all(a > b for a, b in pairwise(rates[3:])) and 0 < rates[-1] < 1e-3


def test_a_loss_that_is_no_number_or_that_grows_stops_the_training_with_what_is_kept() -> None:
    curve = Curve(1)
    for _ in range(30):
        curve.add(2.0, 1e-3, 1.0, kept=0)
    with pytest.raises(
        ValueError, match="the loss of step 31 is nan; the state of step 20 is kept, and running again goes on from it"
    ):
        curve.add(float("nan"), 1e-3, 1.0, kept=20)
    for first in (2.0, 0.01):
        curve = Curve(1)
        with pytest.raises(
            ValueError, match="the training diverges: .* up to step (1[1-9]|2[0-9]) is .*; no state was saved before"
        ):
            for step in range(40):
                curve.add(first + max(0, step - 9) * 0.5, 1e-3, 1.0, kept=0)
    curve = Curve(1)
    for step in range(200):  # noise, and a slow rise by less than a nat, are no divergence
        curve.add(0.05 + 0.9 * (step % 2) + step * 1e-3, 1e-3, 1.0, kept=0)


def test_the_divergence_over_some_tokens_and_the_rest_is_a_bound_that_all_of_them_reach() -> None:
    torch.manual_seed(0)
    p_TV, q_TV = (torch.randn(7, 20).mul(3).log_softmax(-1) for _ in range(2))
    whole_T = (p_TV.exp() * (p_TV - q_TV)).sum(-1)
    divergences = []
    for top in (1, 5, 19, 20):
        log_TK, id_TK = p_TV.topk(top, dim=-1)
        rest_T = p_TV.scatter(-1, id_TK, -torch.inf).logsumexp(-1)
        divergences.append(Likeliest(id_TK, log_TK, rest_T).divergence(q_TV))
    for fewer_T, more_T in pairwise(divergences):
        assert (fewer_T <= more_T + 1e-5).all()
    assert torch.allclose(divergences[-1], whole_T, atol=1e-5) and torch.allclose(divergences[-2], whole_T, atol=1e-5)
    logits = q_TV.clone().requires_grad_()
    log_TK, id_TK = p_TV.topk(20, dim=-1)
    every = Likeliest(id_TK, log_TK, torch.full((7,), -torch.inf))
    for taught in (every, Whole(p_TV)):
        logits.grad = None
        divergence = taught.divergence(logits)
        assert torch.allclose(divergence, whole_T, atol=1e-5)
        divergence.sum().backward()
        assert torch.allclose(logits.grad, q_TV.exp() - p_TV.exp(), atol=1e-5)
