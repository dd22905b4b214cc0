"""Low-rank additions: they begin at nothing, are the same everywhere, leave padding alone, and cost one sum a forward pass."""

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeflow.arch import Family
from moeflow.methods.finetune import lora
from moeflow.methods.finetune.lora import Addition
from moeflow.methods.finetune.recipe import Recipe
from moeflow.methods.finetune.trained import parameters_of, part_of
from moeflow.model.factors import STACKS, Stack
from moeflow.model.formats import Format
from tests import tiny
from tests.compressed import compress
from tests.models import attached


def test_an_addition_begins_at_nothing_and_is_drawn_alike_in_every_process() -> None:
    w = torch.randn(3, 8, 6)
    drawn = (("a", 0), ("a", 0), ("b", 0), ("a", 1))
    made = [Addition(w, name, Recipe(rank=2, alpha=8.0, seed=seed)) for name, seed in drawn]
    assert all(torch.equal(m(w), w) for m in made)
    assert torch.equal(made[0].a, made[1].a)
    assert not torch.equal(made[0].a, made[2].a) and not torch.equal(made[0].a, made[3].a)
    assert made[0].a.shape == (3, 2, 6) and made[0].b.shape == (3, 8, 2) and made[0].a.abs().max() <= 6**-0.5
    torch.nn.init.ones_(made[0].b)
    assert torch.allclose(made[0](w), w + 4.0 * made[0].b @ made[0].a)
    assert torch.allclose(made[0](w) - w, lora.product(made[0].a, made[0].b, 4.0), atol=1e-6)


@pytest.mark.parametrize("stack", [s for s in STACKS if s.factors], ids=lambda s: s.name)
def test_padding_of_stacked_factors_stays_zero(stack: Stack) -> None:
    """Also where the sizes of experts put them in another order, and into several buckets."""
    format = Format(4, gate=(5, 0, 2, 30), up=(3, 0, 7, 33), down=(0, 4, 6, 5))
    shape = stack.shape(format, 12, 10)
    pieces = [torch.ones(stack.piece_shape(format, m, e, 12, 10)) for m in stack.matrices for e in stack.experts(format)]
    each = len(stack.experts(format))
    full = stack.stacked([pieces[i : i + each] for i in range(0, len(pieces), each)])
    apart, joined = stack.apart(format, shape[-1]), partial(stack.joined, format=format)
    addition = Addition(torch.zeros(shape), "x", Recipe(rank=2, alpha=2.0), shape=apart, joined=joined)
    assert addition.a.shape[0] == addition.b.shape[0] == each
    torch.nn.init.ones_(addition.b)
    changed = addition(torch.zeros(shape)) != 0
    assert torch.equal(changed, full != 0) and changed.any()


@pytest.mark.parametrize("stack", [s for s in STACKS if s.factors], ids=lambda s: s.name)
def test_what_is_added_to_factors_is_each_experts_own_product(stack: Stack) -> None:
    format = Format(4, gate=(5, 0, 2, 30), up=(3, 0, 7, 33), down=(0, 4, 6, 5))
    shape = stack.shape(format, 12, 10)
    apart, joined = stack.apart(format, shape[-1]), partial(stack.joined, format=format)
    addition = Addition(torch.zeros(shape), "x", Recipe(rank=2, alpha=2.0), shape=apart, joined=joined)
    torch.nn.init.normal_(addition.b)
    products = lora.product(addition.a, addition.b, 1.0).chunk(len(stack.matrices), dim=1)
    experts = stack.experts(format)
    for matrix, expert, piece_MN in stack.pieces(addition(torch.zeros(shape)), format):
        whole_MN = products[stack.matrices.index(matrix)][experts.index(expert)]
        torch.testing.assert_close(piece_MN, whole_MN[tuple(map(slice, piece_MN.shape))])


def test_a_sum_is_made_once_for_each_forward_pass_and_is_gone_behind_it(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.write("mixtral", tmp_path)).eval()
    model.config._experts_implementation = "eager"  # asks for the stack once for each expert
    names = [n for n, _ in model.named_parameters() if "experts" in n or "q_proj" in n]
    ids = torch.randint(3, 96, (1, 8))
    before = model(ids).logits
    lora.attach(model, names, Recipe(rank=4))
    lora.apply(model)
    made: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Addition):
            module.register_forward_hook(lambda *_, name=name: made.append(name))
    assert torch.equal(model(ids).logits, before), "it begins at nothing"
    assert len(made) == len(set(made)) == len(names) == 9
    trained = parameters_of(model)
    assert set(trained) == {n + end for n in names for end in (lora.A, lora.B)}
    assert all(p.requires_grad == (n.endswith((".a", ".b"))) for n, p in model.named_parameters())
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.normal_(std=0.1 if name.endswith(lora.B) else 1.0)
    assert not torch.allclose(model(ids).logits, before, atol=1e-2)
    with pytest.raises(Exception, match="index out of range"):
        model(ids + 1000)
    for layer in model.model.layers:
        experts = layer.get_submodule(Family.of(model.config.to_dict()).arch.block).experts
        assert experts.gate_up_proj is experts._parameters["gate_up_proj"], "as it was"


def test_trained_parameters_are_sorted_by_layer() -> None:
    names = ("model.layers.2.a", "model.norm.weight", "model.layers.10.b", "model.layers.2.c")
    assert [part_of(name) for name in names] == ["layer-002", "rest", "layer-010", "layer-002"]


@pytest.mark.parametrize("kind", ["low rank", "compressed"])
def test_what_is_added_to_experts_of_our_own_is_computed(kind: str, tmp_path: Path) -> None:
    plain = tiny.write("mixtral", tmp_path / "plain")
    made = compress(plain, tmp_path / "made") if kind == "low rank" else attached(plain, tmp_path / "made")
    model = AutoModelForCausalLM.from_pretrained(made).eval()
    names = [n for n, _ in model.named_parameters() if ".experts." in n and (kind == "low rank" or ".compressed." in n)]
    lora.attach(model, names, Recipe(rank=2, alpha=2.0))
    lora.apply(model)
    ids = torch.randint(3, 96, (1, 8))
    before = model(ids).logits
    for name, module in model.named_modules():
        if isinstance(module, Addition):
            torch.nn.init.ones_(module.b)
            assert not torch.equal(model(ids).logits, before), name
            torch.nn.init.zeros_(module.b)
    assert torch.equal(model(ids).logits, before)
