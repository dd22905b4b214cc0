"""Model types by the config.json of a published checkpoint, which differs from what transformers writes."""

import pytest

from moeflow.model.structure.anatomy import Unknown
from moeflow.model.structure.looking import look
from tests.published import PUBLISHED

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
