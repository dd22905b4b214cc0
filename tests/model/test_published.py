"""Model types by the config.json of a published checkpoint, which differs from what transformers writes."""

import pytest

from moeflow.model.structure.anatomy import Unknown
from moeflow.model.structure.building import whole
from moeflow.model.structure.listing import default
from moeflow.model.structure.looking import look
from moeflow.model.structure.tiny import tiny
from tests.published import KIMI_LINEAR, PUBLISHED

OFTEN = ("Hunyuan-A13B",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in OFTEN else pytest.mark.slow) for n in PUBLISHED])
def test_a_published_configuration_is_understood(name: str) -> None:
    config = PUBLISHED[name]
    answer = look(config)
    text = config.get("text_config", config)
    assert answer.proven["streamed"] == 0.0 and answer.proven["pruned"] < 1e-5
    assert len(answer.arch.moe or ()) == text["num_hidden_layers"] - text.get("first_k_dense_replace", 0)
    width = text.get("moe_intermediate_size", text["intermediate_size"])
    assert answer.arch.expert_width == (width[0] if isinstance(width, list) else width)


@pytest.mark.parametrize(("key", "why"), [("moe_topk", "choose different numbers"), ("num_experts", "have different numbers")])
def test_numbers_that_differ_by_layer_are_told(key: str, why: str) -> None:
    with pytest.raises(Unknown, match=rf"{key} of config.json is \[4, 8, .*{why} of experts"):
        look(PUBLISHED["Hunyuan-A13B"] | {key: [4, 8] * 16})


def test_experts_that_see_no_hidden_states_are_told() -> None:
    """As in Nemotron 3 Super, whose experts are narrower than the model."""
    with pytest.raises(Unknown, match="its experts see what fc1_latent_proj makes of the hidden states"):
        look(default("nemotron_h") | {"moe_latent_size": 64})


@pytest.mark.slow
def test_weights_that_transformers_joins_are_told() -> None:
    """Once a tiny model runs whose layers and heads are made fewer in their own entry."""
    small = tiny(whole(KIMI_LINEAR))["linear_attn_config"]
    assert small["kda_layers"] == [1, 2, 3, 5, 6, 7] and small["full_attn_layers"] == [4, 8] and small["num_heads"] == 4
    with pytest.raises(Unknown, match=r"self_attn.conv1d.weight is not on disk as it is in memory; it is converted"):
        look(KIMI_LINEAR)


@pytest.mark.slow
def test_stacks_of_gate_and_of_up_that_lie_apart_are_found() -> None:
    """As in Step 3.7."""
    answer = look(default("step3p7"))
    names = [s.name.rpartition(".moe.")[2] for s in answer.layout.stacked]
    assert names == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"] and all(
        len(s.parts) == 1 for s in answer.layout.stacked
    )
