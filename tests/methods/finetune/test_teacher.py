"""A few tokens of a teacher's predictions teach, on average, what all of them do."""

import pytest
import torch
from torch import Tensor

from moeflow.methods.finetune.teacher import cut, divergence, drawn

VOCABULARY, DRAWS = 40, 60_000


def predictions(seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)).mul(1.5).log_softmax(-1)


def whole(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    return (p_TV.exp() * (p_TV - q_TV)).sum(-1)


def test_the_whole_vocabulary_gives_the_divergence_and_its_gradient_exactly() -> None:
    p_TV, q_TV = predictions(0, rows=7), predictions(1, rows=7)
    logits = q_TV.clone().requires_grad_()
    found_T = divergence(logits, *long(cut(p_TV, VOCABULARY, torch.Generator())))
    torch.testing.assert_close(found_T, whole(p_TV, q_TV))
    found_T.sum().backward()
    assert torch.allclose(logits.grad, q_TV.exp() - p_TV.exp(), atol=1e-5)


@pytest.mark.parametrize("kept", [4, 8, 20, 39])
def test_fewer_tokens_give_both_on_average(kept: int) -> None:
    """The likeliest alone, and all others as one, would be half of it at 8 of 40."""
    p_TV, q_TV = predictions(0), predictions(1)
    assert drawn(kept, VOCABULARY) == kept // 4
    logits = q_TV.expand(DRAWS, -1).clone().requires_grad_()
    found_T = divergence(logits, *long(cut(p_TV.expand(DRAWS, -1), kept, torch.Generator().manual_seed(2))))
    noise = float(found_T.std()) / DRAWS**0.5
    assert float(found_T.mean()) == pytest.approx(float(whole(p_TV, q_TV)), abs=5 * noise + 1e-6)
    found_T.mean().backward()
    assert torch.allclose(logits.grad.sum(0), (q_TV.exp() - p_TV.exp())[0], atol=5e-3)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_where_none_is_drawn_all_others_count_as_one(kept: int) -> None:
    p_TV, q_TV = predictions(0, rows=7), predictions(1, rows=7)
    id_TK, log_p_TK, rest_T = long(cut(p_TV, kept, torch.Generator()))
    lumped_q = torch.cat([q_TV.gather(-1, id_TK), q_TV.scatter(-1, id_TK, -torch.inf).logsumexp(-1, keepdim=True)], dim=-1)
    lumped_p = torch.cat([log_p_TK, rest_T[:, None]], dim=-1)
    found_T = divergence(q_TV, id_TK, log_p_TK, rest_T)
    torch.testing.assert_close(found_T, whole(lumped_p, lumped_q))
    assert (found_T <= whole(p_TV, q_TV) + 1e-6).all()


def test_a_prediction_that_leaves_nothing_to_draw_is_whole_by_its_likeliest() -> None:
    """As where a vocabulary is padded, and the head says minus infinity of what is no token."""
    p_TV, q_TV = torch.full((1, VOCABULARY), -torch.inf), predictions(1)
    p_TV[0, :5] = predictions(0)[0, :5].log_softmax(-1)
    found_T = divergence(q_TV, *long(cut(p_TV, 8, torch.Generator().manual_seed(2))))
    torch.testing.assert_close(found_T, whole(p_TV[:, :5], q_TV[:, :5]))


def long(taught: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return taught[0].long(), taught[1], taught[2]
