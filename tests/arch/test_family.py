"""A family knows the names of its tensors, on disk and in memory, and what its router can do with."""

import re
from pathlib import Path

import pytest

from moeflow.arch import ARCH, Family, layer_of
from moeflow.model.layout import Folder, headers, read_config
from tests import normal, tiny


def test_a_family_without_experts_is_refused_with_where_those_are_listed() -> None:
    with pytest.raises(ValueError, match="'gpt2', which is not supported: .* no number of experts; `moeflow families` lists"):
        Family.of({"model_type": "gpt2"})


def test_a_compressed_checkpoint_is_of_the_family_that_it_was_made_of() -> None:
    assert Family.of({"model_type": "moeflow_olmoe"}).arch == Family.of({"model_type": "olmoe"}).arch


def test_names_in_memory_lead_back_to_those_on_disk(family: Path) -> None:
    of = Family.of(read_config(Folder(family)))
    for name in headers(Folder(family)):
        layer = layer_of(name)
        if layer is not None and of.kind(name) != "experts":
            prefix = of.prefix(layer)
            assert of.on_disk(prefix + of.in_memory(name.removeprefix(prefix))) == name


def test_every_tensor_is_of_the_kind_that_its_name_says(family: Path) -> None:
    of = Family.of(read_config(Folder(family)))
    kinds: dict[str, set[str]] = {}
    for name in headers(Folder(family)):
        kinds.setdefault(of.kind(name), set()).add(name)
    layers = of.moe_layers
    assert kinds["experts"] == {n for i in layers for e in range(of.num_experts) for n in of.expert(i, e)}
    assert kinds["router"] == {of.router(i) for i in layers}
    assert kinds.get("fixed", set()) == {n for i in layers for n in of.router_tensors(i)[1:]}
    assert kinds.get("shared", set()) == {n for i in layers for n in (*(of.shared(i) or ()), of.shared_gate(i)) if n}
    assert all("self_attn" in n for n in kinds["attention"]) and all("norm" in n for n in kinds["norm"])
    assert "dense" not in kinds or len(layers) < of.num_layers
    assert not any(n.startswith("model.layers.") for n in kinds["rest"])


def test_stacks_of_experts_are_experts_whatever_their_block_is_called_on_disk(family: Path) -> None:
    """So that they are trained: a Phi-3.5-MoE's lie in `mlp` in memory and in `block_sparse_moe` on disk."""
    of = Family.of(read_config(Folder(family)))
    stem = f"{of.prefix(of.moe_layers[0])}{of.arch.block}.experts."
    assert {of.kind(of.on_disk(stem + stack)) for stack in ("gate_up_proj", "down_proj")} == {"experts"}


def test_what_a_hybrid_has_in_the_place_of_attention_is_of_its_kind() -> None:
    """Under a name of its own, or under the block's in layers without experts; dense networks beside the block are not."""
    arch, config = normal.FAMILIES["nemotron_h"]
    nemotron = Family.of({**tiny.COMMON, **config, ARCH: arch.to_json()})
    linear = Family.of({**tiny.COMMON, ARCH: normal.FAMILIES["qwen3_next"][0].to_json()})
    kinds = {
        "0.mixer.in_proj.weight": "attention", "2.mixer.q_proj.weight": "attention", "0.mixer.conv1d.weight": "attention",
        "1.mixer.shared_experts.up_proj.weight": "shared", "1.mixer.gate.weight": "router", "0.mixer.up_proj.weight": "dense",
        "1.mixer.fc1_latent_proj.weight": "dense", "1.mixer.experts.3.down_proj.weight": "experts", "0.norm.weight": "norm",
    }  # fmt: skip
    assert {n: nemotron.kind(f"model.layers.{n}") for n in kinds} == kinds
    others = {
        "0.linear_attn.in_proj_qkvz.weight": "attention", "0.self_attn.q_norm.weight": "attention", "0.mlp.up_proj.weight": "dense",
        "0.shared_mlp.input_linear.weight": "dense", "0.post_attention_layernorm.weight": "norm", "0.mamba.A_log": "attention",
    }  # fmt: skip
    assert {n: linear.kind(f"model.layers.{n}") for n in others} == others
    assert not nemotron.pattern("model.layers.0.mixer.in_proj").startswith("re:.*mixer")


def test_a_quantization_config_ignores_a_module_by_its_name_on_disk_and_in_memory(family: Path) -> None:
    of = Family.of(read_config(Folder(family)))
    names = [n.removesuffix(".weight") for n, info in headers(Folder(family)).items() if len(info.shape) == 2]
    for name in (n for n in names if layer_of(n) in of.moe_layers and of.kind(f"{n}.weight") != "experts"):
        prefix = of.prefix(int(layer_of(name) or 0))
        pattern = of.pattern(name)
        assert pattern.startswith("re:")
        for either in (name, prefix + of.in_memory(name.removeprefix(prefix) + ".").removesuffix(".")):
            assert re.match(pattern.removeprefix("re:"), either)
        others = [n for n in names if of.kind(f"{n}.weight") == "experts"]
        assert not any(re.match(pattern.removeprefix("re:"), n) for n in others)


def test_the_gate_beside_a_down_matrix_is_that_of_the_same_expert(family: Path) -> None:
    of = Family.of(read_config(Folder(family)))
    layer = of.moe_layers[-1]
    gate, up, down = of.expert(layer, 3)
    assert (of.gate_beside(gate), of.gate_beside(up), of.gate_beside(down)) == (None, None, gate)


def test_the_vectors_of_compressed_experts_are_no_part_of_an_expert_whose_zeros_stay() -> None:
    of = Family.of({"model_type": "mixtral"})
    inside = "model.layers.0.mlp.experts."  # in memory
    assert of.in_expert(of.on_disk(inside + "gate_up_proj")) and of.in_expert(of.expert(0, 1)[2])
    assert not of.in_expert(of.on_disk(inside + "compressed.gate"))
