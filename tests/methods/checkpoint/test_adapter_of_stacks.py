"""An adapter of a checkpoint whose experts lie in stacks is merged as PEFT merges it, or refused; the result is in stacks too."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.graph import Model
from moeflow.sources import pin
from tests import layouts, tiny
from tests.models import pulled
from tests.running import store_in

FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def trained(model: Any, at: Path, **options: Any) -> dict[str, Tensor]:
    """Save an adapter of the model with random factors; return the state of the model that PEFT merges it into."""
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **options))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    made.save_pretrained(at)
    return dict(made.merge_and_unload().state_dict())


def merging(base: Path, adapter: Path, kind: str = "") -> Model:
    found = layouts.KINDS[kind].found if kind else None
    return checkpoint.pinned(pin(str(base), kind="model", adapter=str(adapter)), found=found)


def test_stacks_that_a_family_has_in_memory_get_an_adapter_of_their_experts(tmp_path: Path) -> None:
    tiny.write("mixtral", tmp_path / "plain", num_hidden_layers=2)
    base, model = tmp_path / "base", AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    model.save_pretrained(base, save_original_format=False)
    theirs = trained(model, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=FUSED)
    ours = load_file(base / "model.safetensors")
    result = pulled(store_in(tmp_path), merging(base, tmp_path / "adapter"), tmp_path)
    made = layouts.raw(result)
    assert {*made} == {*ours} and any(n.endswith("experts.gate_up_proj") for n in made)
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=name)
    assert sum(not torch.equal(made[n], ours[n]) for n in made) == 2 * 3


@pytest.mark.parametrize("kind", ["granitemoe", "qwen3_5_moe in stacks"])
def test_families_that_are_looked_at_get_an_adapter_of_their_attention(kind: str, tmp_path: Path) -> None:
    base = layouts.write(kind, tmp_path / "base")
    model = getattr(transformers, layouts.KINDS[kind].model).from_pretrained(base)
    theirs = trained(model, tmp_path / "adapter", target_modules=r".*layers\.1\.self_attn\.(q|o)_proj")
    result = pulled(store_in(tmp_path), merging(base, tmp_path / "adapter", kind), tmp_path)
    made, before = layouts.raw(result), layouts.raw(base)
    assert {*made} == {*before}
    changed = [n for n in made if not torch.equal(made[n], before[n])]
    assert len(changed) == 2
    for name in changed:
        torch.testing.assert_close(made[name], theirs[name], rtol=1e-5, atol=1e-6, msg=name)


STACKS = {
    "granitemoe": "block_sparse_moe", "llama4": "feed_forward", "qwen3_5_moe": "mlp", "qwen3_5_moe in stacks": "mlp",
    "qwen3_vl_moe": "mlp",
}  # fmt: skip


@pytest.mark.parametrize("kind", [k if k == "granitemoe" else pytest.param(k, marks=pytest.mark.slow) for k in STACKS])
def test_families_that_are_looked_at_get_an_adapter_of_their_experts(kind: str, tmp_path: Path) -> None:
    """One by one on disk, in stacks, on their side, and inside a multimodal model: compared as transformers loads the result."""
    base = layouts.write(kind, tmp_path / "base")
    load = getattr(transformers, layouts.KINDS[kind].model).from_pretrained
    before, block = load(base).state_dict(), STACKS[kind]
    targets = [f"{block}.experts.{matrix}" for matrix in ("gate_up_proj", "down_proj")]
    theirs = trained(load(base), tmp_path / "adapter", target_modules=[], target_parameters=targets)
    made = load(pulled(store_in(tmp_path), merging(base, tmp_path / "adapter", kind), tmp_path)).state_dict()
    assert {*made} == {*theirs} and sum(not torch.equal(made[n], before[n]) for n in made) == 2 * 2
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def test_an_adapter_of_stacks_whose_rows_take_turns_is_refused(tmp_path: Path) -> None:
    base = layouts.write("gpt_oss", tmp_path / "base")
    model = transformers.GptOssForCausalLM.from_pretrained(base)
    trained(model, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=FUSED)
    with pytest.raises(ValueError, match="merges no stacked experts of a gpt_oss; merge it with PEFT") as refused:
        merging(base, tmp_path / "adapter", "gpt_oss")
    assert "\n" not in str(refused.value)
