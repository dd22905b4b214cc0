"""A layer prepared once weighs every subset as evaluating it does, for every family and in every neighbourhood."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moeflow.arch import Family
from moeflow.methods.prune import subset_search
from moeflow.methods.prune.errors import mask_of, squared_errors
from moeflow.methods.prune.gram import Weighed, room
from moeflow.methods.prune.ranked import Ranked
from moeflow.methods.prune.searches import Search
from moeflow.methods.prune.subsets import Subsets
from moeflow.methods.recipes import naee
from moeflow.model.checkpoint import Tensors, read_moe
from moeflow.model.layout import Folder, read_config
from moeflow.model.moe import MoELayer
from tests import tiny
from tests.layers import layer, squared_errors_direct
from tests.models import calibrated
from tests.running import model_in, run, store_in


def layers_of(family: Path) -> list[MoELayer]:
    """A layer of the family as its checkpoint has it, without groups, and with its weights the other way normalised."""
    config = read_config(Folder(family))
    moe = read_moe(Tensors(family), config, Family.of(config).moe_layers[-1])
    ungrouped = replace(moe, router=replace(moe.router, groups=1, topk_groups=1))
    return [moe, ungrouped, replace(ungrouped, router=replace(ungrouped.router, normalize=not moe.router.normalize))]


def neighbours_one_by_one(moe: MoELayer, x_TD: Tensor, kept_E: Tensor) -> dict[tuple[int, int], float]:
    experts, errors = moe.num_experts, {}
    for out in kept_E.nonzero()[:, 0].tolist():
        for into in [*(~kept_E).nonzero()[:, 0].tolist(), experts]:
            mask_E = torch.cat([kept_E, kept_E.new_zeros(1)])
            mask_E[out], mask_E[into] = False, True
            errors[out, into] = float(squared_errors(moe, x_TD, mask_E[None, :experts])[0])
    return errors


def test_prepared_layers_give_the_errors_of_every_family(family: Path) -> None:
    """Whatever the batches; the neighbours of a subset are its neighbours, each evaluated."""
    draw = torch.Generator().manual_seed(1)
    for moe in layers_of(family):
        experts, x_TD = moe.num_experts, torch.randn(120, moe.router_ED.shape[1], generator=draw)
        weighed = Weighed.of(moe, x_TD.split(50))
        for keep in (6, 4):
            mask_SE = mask_of(list(Subsets(experts, keep, moe.router.groups)), experts)
            expected_S, norm = squared_errors(moe, x_TD, mask_SE)
            torch.testing.assert_close(weighed.squared_errors(mask_SE), expected_S, rtol=1e-5, atol=1e-9 * float(norm))
            torch.testing.assert_close(weighed.norm, norm, rtol=1e-5, atol=0.0)
            if keep == 6 and moe.router.groups > 1:
                continue  # what is left of a group must serve the router
            distance_EN = weighed.neighbours(mask_SE[3], torch.ones(experts, experts + 1, dtype=torch.bool))
            expected = neighbours_one_by_one(moe, x_TD, mask_SE[3])
            assert {tuple(move) for move in distance_EN.isfinite().nonzero().tolist()} == set(expected)
            for move, error in expected.items():
                assert float(distance_EN[move]) ** 2 == pytest.approx(error, rel=2e-5)


def test_a_layer_prepared_for_few_drops_runs_its_experts_on_few_tokens_and_refuses_more() -> None:
    moe, x_TD = layer(8, 2), torch.randn(200, 8)
    weighed = Weighed.of(moe, [x_TD], drop_at_most=2)
    assert all(isinstance(piece, Ranked) and piece.gram_TVV.shape[1:] == (4, 4) for piece in weighed.pieces)
    mask_SE = mask_of(list(Subsets(8, 6)), 8)
    torch.testing.assert_close(weighed.squared_errors(mask_SE), squared_errors(moe, x_TD, mask_SE)[0], rtol=1e-5, atol=0.0)
    assert weighed.neighbours(mask_SE[0], torch.ones(8, 9, dtype=torch.bool))[:, -1].isinf().all()
    with pytest.raises(ValueError, match="drops 3 of 8 experts .* dropping 2 at most"):
        weighed.squared_errors(mask_of([(0, 1, 2, 3, 4)], 8))
    with pytest.raises(ValueError, match="drop_at_most=7 must lie between 0 and 6"):
        Weighed.of(moe, [x_TD], drop_at_most=7)


def test_as_many_tokens_as_have_room_take_no_more() -> None:
    moe, x_TD = layer(8, 2), torch.randn(200, 8)
    per_token = (1 << 20) // room(moe, 6, 1 << 20)
    fits = room(moe, 6, 100 * per_token)
    weighed = Weighed.of(moe, x_TD[:fits].split(60))
    assert weighed.tokens == fits and 90 <= fits <= 110
    tensors = [value for piece in weighed.pieces for value in vars(piece).values() if isinstance(value, Tensor)]
    assert sum(t.nbytes for t in tensors) <= 100 * per_token
    mask_SE = mask_of(list(Subsets(8, 4)), 8)
    expected_S, _ = squared_errors(moe, x_TD[:fits], mask_SE)
    torch.testing.assert_close(weighed.squared_errors(mask_SE), expected_S, rtol=1e-5, atol=0.0)
    with pytest.raises(ValueError, match="no tokens to weigh the experts on"):
        Weighed.of(moe, [x_TD[:0]])


def test_tokens_without_room_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards of 64 tokens, and room for half of a hundred from each."""
    monkeypatch.setattr(subset_search, "room", lambda moe, drop_at_most: 100)
    (choice, *_) = naee.prune(calibrated(model_in(tiny.write("mixtral", tmp_path / "model")), tmp_path), 6, Search("swap")).choices
    store = store_in(tmp_path)
    outcome = run(store, choice)
    assert json.loads(store.artifact(choice.key).file("choice.json").read_text())["loss"]["tokens"] == 100
    notes = [note for step in outcome.steps for note in step.notes]
    assert "weighed on 100 tokens: there was no room for 28 more" in notes


def test_logits_too_far_apart_for_fp32_are_left_to_the_router() -> None:
    """When all likely experts go, the weights of the unlikely ones still add up to one."""
    moe, x_TD = layer(8, 2), torch.randn(64, 8).abs()
    moe.router_ED[:4] += 40
    weighed = Weighed.of(moe, [x_TD])
    assert not any(isinstance(piece, Ranked) for piece in weighed.pieces)
    mask_SE = mask_of([(4, 5, 6, 7), (0, 1, 4, 5)], 8)
    torch.testing.assert_close(weighed.squared_errors(mask_SE), squared_errors(moe, x_TD, mask_SE)[0], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("near", [1e-2, 1e-3])
def test_experts_that_nearly_cancel_are_weighed_to_a_small_part_of_the_output(near: float) -> None:
    """Gram matrices are in fp32: what is left of a difference is right to 1e-7 of the squared norm of the output."""
    moe, x_TD = layer(8, 2), torch.randn(500, 8)
    twin = replace(moe.experts[0], down_DF=moe.experts[0].down_DF * (1 + near))
    moe.router_ED[1] = 0.99 * moe.router_ED[0]
    moe.router_ED[2:] -= 10 * moe.router_ED[0]
    moe = replace(moe, experts=(moe.experts[0], twin, *moe.experts[2:]), router=replace(moe.router, top_k=1))
    x_TD = x_TD[(x_TD @ moe.router_ED[0]) > 1]
    mask_SE = mask_of([(1, 2, 3, 4, 5, 6, 7)], 8)
    exact = float(squared_errors_direct(moe.to(dtype=torch.float64), x_TD.double(), mask_SE)[0])
    weighed = Weighed.of(moe, [x_TD], drop_at_most=1)
    assert exact == pytest.approx(near**2 * float(weighed.norm), rel=1e-3)
    assert float(weighed.squared_errors(mask_SE)) == pytest.approx(exact, abs=1e-7 * float(weighed.norm))
