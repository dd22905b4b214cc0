"""Experts that are divided: the shares' outputs add up to those of all of them."""

from pathlib import Path

import pytest
import torch

from moeflow.arch import Family
from moeflow.model.checkpoint import Tensors
from moeflow.model.formats import layer_formats
from moeflow.model.routed_experts import experts_of
from moeflow.serve.pieces import Pieces
from tests.compressed import load
from tests.serve import forms

MADE = ("low_rank", "skipping", "vectors", "counts")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forms.original("mixtral", tmp_path_factory.mktemp("shares") / "original")


@torch.inference_mode()
@pytest.mark.parametrize("form", MADE)
def test_the_shares_of_a_layers_experts_add_up_to_all_of_them(source: Path, form: str, tmp_path: Path) -> None:
    model, tensors = load(forms.FORMS_OF[form](source, tmp_path / form)), Tensors(tmp_path / form)
    config = model.config.to_dict()
    hidden = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    for layer, format in enumerate(layer_formats(config)):
        block = model.model.layers[layer].mlp
        _, weights_Tk, index_Tk = block.gate(hidden)
        whole, half = block.experts(hidden, index_Tk, weights_Tk), format.experts // 2
        assert whole.abs().mean() > 1e-3
        parts = []
        for share in (range(half), range(half, format.experts)):
            made, pieces = experts_of(block.experts, format, config, share), Pieces(Family.of(config))
            pieces.add(layer, format, made, share)
            stem = Family.of(config).experts(layer)
            assert all(pieces.take(n, tensors[n]) for n in tensors if n.startswith(stem))
            pieces.check_whole(form)
            parts.append(made(hidden, index_Tk, weights_Tk))
        torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-4, atol=1e-4)


def test_a_piece_of_another_shape_and_one_that_does_not_come_are_told(source: Path, tmp_path: Path) -> None:
    model = load(forms.counts(source, tmp_path / "counts"))
    family = Family.of(model.config.to_dict())
    pieces, name = Pieces(family), family.expert(0, 3)[0]
    pieces.add(0, layer_formats(model.config.to_dict())[0], model.model.layers[0].mlp.experts)
    assert not pieces.take("model.norm.weight", torch.zeros(128))
    with pytest.raises(ValueError, match=rf"{name} has shape \(96, 64\) where config.json asks for \(96, 128\)"):
        pieces.take(name, torch.zeros(96, 64))
    with pytest.raises(ValueError, match="folder has no tensor .* and 8 more, which its config.json asks for"):
        pieces.check_whole("folder")
