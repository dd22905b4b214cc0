"""The configuration with fewer decoder layers, where it does not depend on which of them go."""

from typing import Any

import pytest

from moeflow.arch import ARCH, Arch, Family
from moeflow.arch.fewer_layers import with_fewer_layers

MLP = "model.layers.{layer}.mlp"
FOUND = Arch(model_type="found", router=f"{MLP}.gate.weight", experts=(f"{MLP}.experts.{{expert}}.up.weight",))


def shorter(drop: int, *, together: bool = True, moe: tuple[int, ...] = (0, 1, 2, 3, 4, 5), **said: Any) -> dict[str, Any]:
    config = {"model_type": "found", "num_hidden_layers": 6, ARCH: {**FOUND.to_json(), "moe": list(moe)}, **said}
    return with_fewer_layers(Family.of(config), drop, together=together)


def test_layers_of_one_kind_may_go_one_by_one_and_those_before_the_experts_stay() -> None:
    config = shorter(
        2, together=False, moe=(1, 2, 3, 4, 5), mlp_layer_types=["dense", *["sparse"] * 5], first_k_dense_replace=1,
        no_rope_layers=[1] * 6, dense_layers=[0],
    )  # fmt: skip
    assert config["num_hidden_layers"] == 4 and config["no_rope_layers"] == [1] * 4 and config["dense_layers"] == [0]
    assert config["mlp_layer_types"] == ["dense", "sparse", "sparse", "sparse"]
    assert Family.of(config).moe_layers == [1, 2, 3] and config["first_k_dense_replace"] == 1


def test_layers_of_two_kinds_that_take_turns_go_in_pairs() -> None:
    turns: dict[str, Any] = {"layer_types": ["sliding", "full"] * 3, "moe_layers": [1, 3, 5], "sliding_window_pattern": 2}
    config = shorter(2, moe=(1, 3, 5), hybrid_pattern="MEMEME", **turns)
    assert config["layer_types"] == ["sliding", "full"] * 2 and config["moe_layers"] == [1, 3]
    assert config["hybrid_pattern"] == "MEME" and Family.of(config).moe_layers == [1, 3]


@pytest.mark.parametrize(
    ("drop", "said", "why"),
    [
        (1, {"layer_types": ["sliding", "full"] * 3}, r"layer_types differs by layer: .*; drop a multiple of 2 neighbours"),
        (2, {"layer_types": ["sliding", "full"] * 3, "together": False}, "layer_types differs by layer: .* multiple of 2 neigh"),
        (2, {"layer_types": ["a", "b", "a", "a", "b", "b"]}, "layer_types differs by layer: .*; drop MoE blocks"),
        (1, {"sliding_window_pattern": 3}, "sliding_window_pattern=3 differs by layer: .*; drop a multiple of 3 neighbours"),
        (1, {"moe": (0, 1, 3, 4, 5)}, r"layers \[2\] have no experts, and config.json tells them by number"),
        (1, {"linear": {"full_layers": [3, 6]}}, "linear.full_layers names layers by number: .*; drop MoE blocks"),
        (1, {"full_attn_idxs": [2, 5]}, "full_attn_idxs differs by layer: .*; drop a multiple of 3 neighbours"),
        (1, {"use_sliding_window": True, "max_window_layers": 2}, "max_window_layers=2: attention differs by layer"),
    ],
)
def test_what_depends_on_which_layers_go_is_refused_in_one_line(drop: int, said: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why) as told:
        shorter(drop, **said)
    assert "\n" not in str(told.value)
