"""What config.json asks for is exactly what transformers writes, for every family."""

from pathlib import Path

import pytest

from moeflow.arch import layer_of
from moeflow.arch.found import shapes_of
from moeflow.model import config_check, moe
from moeflow.model.asked import check_layer, check_rest
from moeflow.model.config_check import check_config
from moeflow.model.layout import Folder, headers, read_config
from tests import tiny

VARIANTS: dict[str, dict] = {
    "mixtral": {"head_dim": 24, "tie_word_embeddings": True},
    "qwen2_moe": {"qkv_bias": False},
    "qwen3_moe": {"attention_bias": True, "mlp_only_layers": [0]},
    "olmoe": {"attention_bias": True},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "deepseek_v2": {"q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": {"attention_bias": True, "n_shared_experts": 2},
}
"""Changes to each family's tiny configuration that give it other tensors."""


def check(folder: Path) -> None:
    config = read_config(Folder(folder))
    check_config(config, "config.json")
    tables: dict[int | None, dict] = {}
    for name, info in headers(Folder(folder)).items():
        tables.setdefault(layer_of(name), {})[name] = (info.dtype, info.shape)
    known = shapes_of(config)
    assert known is not None
    check_rest(config, tables.pop(None), known)
    for layer, table in tables.items():
        assert layer is not None
        check_layer(config, layer, table, known)
        for name, (dtype, shape) in table.items():
            with pytest.raises(ValueError, match=r"correct one of them|incomplete|do not multiply"):
                check_layer(config, layer, table | {name: (dtype, (*shape, 1))}, known)


def test_the_activations_that_config_json_may_name_are_those_that_are_computed() -> None:
    assert {*config_check.ACTIVATIONS} == {*moe.ACTIVATIONS}


@pytest.mark.parametrize("family", VARIANTS)
def test_what_transformers_writes_is_what_config_json_asks_for(family: str, tmp_path: Path) -> None:
    check(tiny.write(family, tmp_path / "plain"))
    check(tiny.write(family, tmp_path / "variant", **VARIANTS[family]))
