"""LoRA's additions as an adapter of PEFT: PEFT makes of the base model what moeflow makes of it, and moeflow merges it as well."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from moeflow.arch import ARCH
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.finetune import lora
from moeflow.methods.finetune.peft_format import inexpressible, write_adapter
from moeflow.methods.finetune.recipe import Recipe
from moeflow.methods.finetune.trained import parameters_of
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import Folder
from moeflow.model.structure.looking import look
from moeflow.sources import pin
from tests import tiny
from tests.models import pulled
from tests.running import store_in

RECIPE = Recipe(rank=3, alpha=6.0)


def trained(base: Path, names: list[str]) -> tuple[object, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model with additions that are not nothing, its trained tensors, and the weights that they make."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    setattr(model.config, ARCH, look(model.config.to_dict()).arch.to_json())  # as config.json in a run
    lora.attach(model, names, RECIPE)
    made = {n: torch.randn_like(p) * 0.2 for n, p in parameters_of(model).items()}
    sums = {
        n: p + lora.product(made[n + lora.A], made[n + lora.B], RECIPE.scale) if n + lora.A in made else p
        for n, p in before.items()
    }
    return model, made, sums


@pytest.mark.parametrize("family", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_peft_makes_of_the_adapter_what_moeflow_adds(family: str, tmp_path: Path) -> None:
    """On linear layers and fused experts, also where the stacks of these lie on their side."""
    base = tiny.write(family, tmp_path / "base", num_hidden_layers=2)
    whole = AutoModelForCausalLM.from_pretrained(base).state_dict()
    ends = ("q_proj.weight", "o_proj.weight", "experts.gate_up_proj", "experts.down_proj")
    names = [n for n in whole if n.endswith(ends)]
    assert any("gate_up_proj" in n for n in names)
    model, made, sums = trained(base, names)
    assert inexpressible(made, RECIPE) == ""
    write_adapter(made, model, RECIPE, tmp_path / "adapter")  # type: ignore[arg-type]
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter")
    state = theirs.merge_and_unload().state_dict()
    assert {*state} >= {*sums}
    for name, tensor in sums.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
    assert sum(not torch.equal(state[n], whole[n]) for n in sums) == len(names)


@pytest.mark.slow
def test_moeflow_merges_the_adapter_that_it_has_written(tmp_path: Path) -> None:
    base = tiny.write("mixtral", tmp_path / "base", num_hidden_layers=2)
    names = [
        n for n in AutoModelForCausalLM.from_pretrained(base).state_dict() if n.endswith(("q_proj.weight", "experts.down_proj"))
    ]
    model, made, sums = trained(base, names)
    write_adapter(made, model, RECIPE, tmp_path / "adapter")  # type: ignore[arg-type]
    merged = checkpoint.pinned(pin(str(base), kind="model", adapter=str(tmp_path / "adapter")))
    tensors = Tensors(Folder(pulled(store_in(tmp_path), merged, tmp_path)))
    for layer in range(2):
        at = f"model.layers.{layer}."
        torch.testing.assert_close(tensors[f"{at}self_attn.q_proj.weight"], sums[f"{at}self_attn.q_proj.weight"])
        for e, whole in enumerate(sums[f"{at}mlp.experts.down_proj"]):
            torch.testing.assert_close(tensors[f"{at}block_sparse_moe.experts.{e}.w2.weight"], whole, rtol=1e-5, atol=1e-6)


def test_what_no_adapter_says_is_told() -> None:
    a, b = torch.zeros(2, 4), torch.zeros(4, 2)
    pair = {"x.weight" + lora.A: a, "x.weight" + lora.B: b}
    assert inexpressible(pair, RECIPE) == ""
    assert "keep their zeros" in inexpressible(pair, Recipe(keep_zeros=True))
    assert "trained whole" in inexpressible(pair | {"model.layers.0.mlp.experts.compressed.v": a}, RECIPE)
    with pytest.raises(ValueError, match="adapter=true .* mode='full'"):
        Recipe("full", adapter=True)
