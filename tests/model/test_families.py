"""Our reading of a checkpoint against transformers' own: a swapped name, a wrong axis or a wrong router cannot pass."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeflow.arch import Family
from moeflow.model.checkpoint import Tensors, read_moe
from moeflow.model.layout import Folder, read_config
from moeflow.model.router import dense
from moeflow.model.stream import HIDDEN, Stream
from tests import tiny


def block_of(model: Any, folder: Path, layer: int) -> Any:
    return model.model.layers[layer].get_submodule(Family.of(read_config(Folder(folder))).arch.block)


@torch.inference_mode()
def test_our_layer_computes_what_transformers_computes(family: Path) -> None:
    config = read_config(Folder(family))
    x_TD = torch.randn(200, config["hidden_size"])
    model = AutoModelForCausalLM.from_pretrained(family).eval()
    for layer in Family.of(config).moe_layers:
        theirs = block_of(model, family, layer)(x_TD[None])[0]
        ours = read_moe(Tensors(family), config, layer)
        torch.testing.assert_close(ours(x_TD), theirs, rtol=1e-5, atol=1e-5)
        by_all = torch.einsum("te,ted->td", ours.weights(x_TD), ours.expert_outputs(x_TD))
        torch.testing.assert_close(ours.routed_output(x_TD), by_all, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_config_json_that_leaves_out_what_transformers_takes_by_default_is_the_same_model(tmp_path: Path) -> None:
    """A Phi-3.5-MoE without `router_jitter_noise`, which decides how near a second expert must be."""
    folder = tiny.write("phimoe", tmp_path / "model")
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if "jitter" not in k}
    (folder / "config.json").write_text(json.dumps(config))
    model, x_TD = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.randn(400, config["hidden_size"])
    theirs = block_of(model, folder, 0)(x_TD[None])[0]
    torch.testing.assert_close(read_moe(Tensors(folder), read_config(Folder(folder)), 0)(x_TD), theirs, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_forbidding_experts_is_slicing_them_out_of_the_router(family: Path) -> None:
    """The mask must reach the score by which the router chooses: for DeepSeek-V3 after the bias is added."""
    config = read_config(Folder(family))
    layer = Family.of(config).moe_layers[-1]
    moe, kept = read_moe(Tensors(family), config, layer), [0, 2, 3, 4, 6, 7]
    allowed_E = torch.zeros(moe.num_experts, dtype=torch.bool)
    allowed_E[kept] = True
    x_TD = torch.randn(200, config["hidden_size"])
    masked = moe.weights(x_TD, allowed_E)
    sliced = moe.keep(kept).weights(x_TD)
    assert (masked[:, ~allowed_E] == 0).all()
    torch.testing.assert_close(masked[:, kept], sliced)


@torch.inference_mode()
def test_our_router_chooses_as_transformers_does(family: Path) -> None:
    config = read_config(Folder(family))
    layer = Family.of(config).moe_layers[-1]
    x_TD = torch.randn(300, config["hidden_size"])
    model = AutoModelForCausalLM.from_pretrained(family).eval()
    logits, weights, index = block_of(model, family, layer).get_submodule(Family.of(config).arch.block_router)(x_TD)
    moe = read_moe(Tensors(family), config, layer)
    torch.testing.assert_close(moe.logits(x_TD), logits)
    torch.testing.assert_close(moe.weights(x_TD), dense(weights.float(), index, moe.num_experts))


def streamed(folder: Path, ids_NL: Tensor) -> list[Tensor]:
    """Every hidden state of a model run layer by layer, and its logits."""
    config, tensors = read_config(Folder(folder)), Tensors(folder)
    stream, count = Stream(config), Family.of(config).num_layers
    layers = [{n: tensors[n] for n in tensors if n.startswith(f"model.layers.{i}.")} for i in range(count)]
    rest = {n: tensors[n] for n in tensors if ".layers." not in n}
    states = [{HIDDEN: stream.embed(rest, ids_NL)}]
    for i, layer in enumerate(layers):
        states.append(stream.run(stream.layer(layer, i), i, states[-1]))
    return [s[HIDDEN] for s in states] + [stream.logits(rest)(states[-1][HIDDEN])]


def equal_whole(parts: list[Tensor], model: torch.nn.Module, ids_NL: Tensor) -> None:
    """Hidden states and logits are those of the whole model, bit for bit."""
    whole = model(ids_NL, output_hidden_states=True, use_cache=False)
    *hidden, last, logits = parts
    for mine, theirs in zip(hidden, whole.hidden_states[:-1], strict=True):  # the last one is behind the norm
        assert torch.equal(mine, theirs)
    assert torch.equal(logits, whole.logits) and last.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_streaming_layer_by_layer_is_the_whole_model_bit_for_bit(family: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(family, dtype=dtype).eval()
    model.save_pretrained(tmp_path)
    ids_NL = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    equal_whole(streamed(tmp_path, ids_NL), model, ids_NL)
