"""Which way a checkpoint runs in vLLM, by its config.json alone; without vLLM."""

import re
from typing import Any

import pytest

from moeflow.arch import LAYERS, MAIN
from moeflow.serve.ways import NAMES, architectures, way_of
from tests import tiny

EIGHT: dict[str, Any] = {"experts": 8}
FACTORS: dict[str, Any] = {"experts": 4, "ranks": {"gate": [4] * 4, "up": [4] * 4, "down": [0] * 4}}


def packed(*weights: dict[str, Any]) -> dict[str, Any]:
    """A quantization_config with a group for each of these."""
    groups = {f"group_{n}": {"targets": ["Linear"], "weights": w} for n, w in enumerate(weights)}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


def config(family: str = "mixtral", third: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The config.json of a checkpoint with three layers, the last of another format."""
    plain = tiny.COMMON | tiny.FAMILIES[family] | {"model_type": f"moeflow_{family}", "attention_bias": True, "lm_head_bias": True}
    dense = (plain.get("first_k_dense_replace") or 0, plain.get("mlp_only_layers") or [])
    layers = [{} if i < dense[0] or i in dense[1] else EIGHT for i in (0, 1)]
    return plain | {LAYERS: [*layers, third or {"experts": 6}]} | more


@pytest.mark.parametrize("family", NAMES)
def test_layers_that_differ_in_their_number_of_experts_run_the_native_way(family: str) -> None:
    assert way_of(config(family)).way == "native"
    assert way_of(config(family, FACTORS)).way == "native", "low-rank experts, too"
    asked = way_of(config(family, moeflow_way="general"))
    assert asked.way == "general" and "asks for it" in asked.why


@pytest.mark.parametrize(
    "third, more, why",
    [
        (EIGHT | {"skip": "ratio"}, {}, "layer 2 skips experts"),
        (EIGHT | {"compressed": "one"}, {MAIN: 1}, "layer 2 has Compressed Experts"),
        ({"experts": 0, "gone": "moe"}, {}, "layer 2 has lost its experts"),
        (None, {"quantization_config": packed({"num_bits": 4}, {"num_bits": 8})}, "its packed experts are .* not of the same bits"),
        (FACTORS, {"quantization_config": packed({"num_bits": 4})}, "its packed experts are low-rank"),
        (None, {"hidden_act": "gelu"}, "activation is gelu"),
    ],
)
def test_other_forms_run_the_general_way_and_it_says_why(third: Any, more: dict[str, Any], why: str) -> None:
    chosen = way_of(config(third=third, **more))
    assert chosen.way == "general" and re.search(why, chosen.why)
    with pytest.raises(ValueError, match=f"'native' cannot be: .*{why}.*; leave moeflow_way out"):
        way_of(config(third=third, moeflow_way="native", **more))


@pytest.mark.parametrize(
    "family, more, why",
    [
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("phimoe", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ("phimoe", {"lm_head_bias": False}, "lm_head_bias is not true"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
    ],
)
def test_what_vllms_own_class_would_compute_otherwise_runs_the_general_way(family: str, more: dict[str, Any], why: str) -> None:
    chosen = way_of(config(family, **more))
    assert chosen.way == "general" and why in chosen.why


def test_packed_experts_stay_packed_where_the_engine_has_a_kernel() -> None:
    alike = config(quantization_config=packed({"num_bits": 4, "group_size": 32}))
    assert way_of(alike).way == "native" and "has a kernel" in way_of(alike).why
    refused = way_of(alike, "vLLM has no kernel here")
    assert refused.way == "general" and refused.why == "vLLM has no kernel here"
    with pytest.raises(ValueError, match="'native' cannot be: vLLM has no kernel here; leave moeflow_way out"):
        way_of(alike | {"moeflow_way": "native"}, "vLLM has no kernel here")


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="moeflow_way='fast' .* write one of auto, general, native"):
        way_of(config(moeflow_way="fast"))


def test_both_spellings_of_phi_are_known() -> None:
    known = architectures()
    assert known["MoeflowPhiMoEForCausalLM"] == known["MoeflowPhimoeForCausalLM"] == "moeflow_phimoe" and len(known) == 8
