"""A gpt-oss in MXFP4, as it is published: read as transformers unpacks it, pruned by slicing codes and scales, left in MXFP4."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.utils.quantization_config import Mxfp4Config

from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.model.checkpoint import Tensors
from moeflow.run import StepFailed
from moeflow.step import upstream
from tests import layouts
from tests.layouts import KINDS, model_in, pruned_to, raw
from tests.running import run, store_in

KEEP = {0: [0, 2, 3, 4, 6, 7], 1: [1, 2, 3, 5, 6, 7]}
STACKS = ("gate_up_proj", "down_proj")
FOUND = KINDS["gpt_oss"].found


def coded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts' matrices as random codes and scales."""
    generator = torch.Generator().manual_seed(2)

    def both(name: str, stack: Tensor) -> dict[str, Tensor]:
        experts, columns, rows = stack.shape
        codes = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        return {name + "_blocks": codes, name + "_scales": scales}

    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        made |= both(name, tensor) if name.endswith(STACKS) else {name: tensor.bfloat16()}
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = layouts.write("gpt_oss", tmp_path / "model")
    layouts.edit(folder, coded)
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}
    layouts.configure(folder, lambda config: config | {"dtype": "bfloat16", "quantization_config": said})
    return folder


def test_an_expert_is_read_as_transformers_unpacks_it(source: Path, tmp_path: Path) -> None:
    model, store, held = model_in(source, FOUND), store_in(tmp_path), raw(source)
    run(store, model.layers[1])
    tensors = Tensors(store.artifact(model.layers[1].key))
    stem = "model.layers.1.mlp.experts"
    for name in STACKS:
        whole = convert_moe_packed_tensors(held[f"{stem}.{name}_blocks"], held[f"{stem}.{name}_scales"])
        for expert in range(8):
            matrix = whole[expert].T  # in memory a stack lies on its side, gate and up taking turns
            parts = {"gate_proj": matrix[::2], "up_proj": matrix[1::2]} if name == "gate_up_proj" else {"down_proj": matrix}
            for part, expected in parts.items():
                found = tensors[f"{stem}.{expert}.{part}.weight"]
                assert found.dtype == torch.bfloat16 and torch.equal(found, expected), (expert, part)
    assert not any(n.endswith(("_blocks", "_scales")) for n in tensors)


def test_it_is_pruned_by_slicing_and_stays_in_mxfp4(source: Path, tmp_path: Path) -> None:
    store, target = store_in(tmp_path), checkpoint.checkpoint_of(pruned_to(model_in(source, FOUND), KEEP))
    run(store, target)
    store.fetch(target.key, tmp_path / "out")
    before, after = raw(source), raw(tmp_path / "out")
    assert set(before) == set(after)
    for name, tensor in before.items():
        kept = KEEP[int(name.split(".")[2])] if ".mlp." in name else None
        assert torch.equal(after[name], tensor if kept is None else tensor[kept]), name
    config, old = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", source))
    assert {k for k in config if config[k] != old[k]} == {"num_local_experts"} and list(config) == list(old)
    layer = next(s for s in upstream([target]) if s.name == "checkpoint.layer")
    assert layer.spec.output.mxfp4 and layer.spec.output.expert_numel == 8 * 3 * 32 * 64 + 8 * (64 + 64)
    loaded: Any = GptOssForCausalLM  # its classes are typed more narrowly than they take
    model, info = loaded.from_pretrained(
        tmp_path / "out", quantization_config=Mxfp4Config(dequantize=True), output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    whole, _ = loaded.from_pretrained(source, quantization_config=Mxfp4Config(dequantize=True), output_loading_info=True)
    for i, keep in KEEP.items():
        experts, original = model.model.layers[i].mlp.experts, whole.model.layers[i].mlp.experts
        assert all(torch.equal(t, original.state_dict()[n][keep]) for n, t in experts.state_dict().items())


def test_what_needs_weights_or_layers_that_differ_is_refused(source: Path, tmp_path: Path) -> None:
    model = model_in(source, FOUND)
    with pytest.raises(ValueError, match="layer 0 is in MXFP4; slim the model that it was made of"):
        model.layers[0].spec.output.check_plain("slim")
    uneven = pruned_to(model, {0: [0, 1, 2, 3], 1: [0, 1, 2]})
    with pytest.raises(
        ValueError, match="layers differ .*, and layer 0 is in MXFP4, .*; keep as many in every layer, or start from"
    ):
        checkpoint.checkpoint_of(uneven)


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda n, t: {n: t} if "1.mlp.experts.down_proj_scales" not in n else {},
            "has U8 .* and nothing as codes and scales of model",
        ),
        (lambda n, t: {n: t.half() if "0.mlp.experts.down_proj_scales" in n else t}, "has U8 .* and F16 .* as codes and scales of"),
        (
            lambda n, t: {n: t[..., :8].clone() if "0.mlp.experts.down_proj_blocks" in n else t},
            r"asks for \(8, 64, 1, 16\); correct",
        ),
        (
            lambda n, t: {n: t.to(torch.float8_e4m3fn) if "q_proj.weight" in n else t},
            "has .*q_proj.weight in F8_E4M3 beside experts in",
        ),
    ],
)
def test_half_of_mxfp4_is_named_at_plan_time(source: Path, change: Any, says: str) -> None:
    layouts.edit(source, lambda tensors: {n: t for name, tensor in tensors.items() for n, t in change(name, tensor).items()})
    with pytest.raises(ValueError, match=says):
        model_in(source, FOUND)


def test_mxfp4_that_config_json_does_not_say_and_the_other_way_round(source: Path, tmp_path: Path) -> None:
    layouts.configure(source, lambda config: {k: v for k, v in config.items() if k != "quantization_config"})
    with pytest.raises(ValueError, match="has packed .*_blocks, and its config.json no quantization_config"):
        model_in(source, FOUND)
    plain = layouts.write("gpt_oss", tmp_path / "plain")
    layouts.configure(plain, lambda config: config | {"quantization_config": {"quant_method": "mxfp4"}})
    with pytest.raises(ValueError, match="has no matrix in MXFP4, which its config.json says"):
        model_in(plain, FOUND)
    layouts.configure(source, lambda config: config | {"quantization_config": {"quant_method": "nvfp4"}})
    with pytest.raises(
        ValueError, match=r"is packed \(quantization_config: nvfp4\), and moeflow reads .*; dequantize it to bf16 first"
    ):
        model_in(source, FOUND)


def test_a_scale_that_is_no_number_is_named(source: Path, tmp_path: Path) -> None:
    layouts.edit(
        source, lambda ts: {n: t.clone().fill_(255) if "1.mlp.experts.down_proj_scales" in n else t for n, t in ts.items()}
    )
    store = store_in(tmp_path)
    with pytest.raises(StepFailed, match="model.layers.1.mlp.experts.0.down_proj.weight_scales holds NaN"):
        run(store, model_in(source, FOUND).layers[1])
