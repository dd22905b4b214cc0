"""What looking finds of seven families, beside what their authors' papers, configurations and published checkpoints say.

The names on disk, the routers' arithmetic and the renamings in memory were written down by hand; nothing here looks them up.
"""

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from moeflow.arch import ARCH, Config, Family
from moeflow.arch.found import Found, found, plain
from moeflow.arch.layout import rename
from moeflow.model.asked import check_layer, check_rest
from tests import tiny

MOE, MLP = "model.layers.{layer}.block_sparse_moe", "model.layers.{layer}.mlp"


def _matrices(stem: str, names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")) -> tuple[str, ...]:
    return tuple(f"{stem}.{name}.weight" for name in names)


MIXTRAL: dict[str, Any] = {"router": f"{MOE}.gate.weight", "experts": _matrices(MOE + ".experts.{expert}", ("w1", "w3", "w2"))}
QWEN: dict[str, Any] = {"router": f"{MLP}.gate.weight", "experts": _matrices(MLP + ".experts.{expert}")}
DEEPSEEK = QWEN | {"shared": _matrices(MLP + ".shared_experts"), "groups": True, "router_fp32": True}
SAID: dict[str, dict[str, Any]] = {
    "mixtral": MIXTRAL | {"normalize": "always"},
    "phimoe": MIXTRAL | {"normalize": "never", "score": "sparsemixer", "block_router": "router"},
    "qwen2_moe": QWEN
    | {"normalize": "never", "shared": _matrices(MLP + ".shared_expert"), "shared_gate": MLP + ".shared_expert_gate.weight"},
    "qwen3_moe": QWEN | {"normalize": "always"},
    "olmoe": QWEN | {"normalize": "never"},
    "deepseek_v2": DEEPSEEK | {"normalize": "never", "group_score": "max"},
    "deepseek_v3": DEEPSEEK
    | {"normalize": "always", "score": "sigmoid", "group_score": "top2", "router_bias": MLP + ".gate.e_score_correction_bias"},
}
"""Fields of `Arch`, of tiny models whose configurations are in `tests.tiny`; every other field has its default."""
MEMORY = {"mixtral": (("block_sparse_moe.", "mlp."),), "phimoe": (("block_sparse_moe.gate.", "mlp.router."),)}
KNOWN_BY_CONFIG = ("model_type", "moe", "expert_width", "experts_key", "top_k_key", "memory")


def config_of(name: str) -> Config:
    """The config.json of the family's tiny checkpoint, with groups that a router can be seen to limit."""
    return CONFIG_MAPPING[name](**(tiny.COMMON | tiny.FAMILIES[name])).to_dict()


def looked_at(config: Config) -> Found:
    return found(plain(config), None, "here")


@pytest.mark.parametrize("name", SAID)
def test_looking_finds_the_names_and_the_router_that_papers_and_checkpoints_have(name: str) -> None:
    arch = looked_at(config_of(name)).arch
    fields = {k: v for k, v in arch.to_json().items() if k not in KNOWN_BY_CONFIG}
    said = {k: list(v) if isinstance(v, tuple) else v for k, v in SAID[name].items()}
    defaults = {k: v for k, v in said.items() if k not in fields}
    assert fields == {k: v for k, v in said.items() if k in fields}
    assert all(getattr(arch, k) == v for k, v in defaults.items())
    inside = ("block_sparse_moe.gate.weight", "mlp.gate_proj.weight", "self_attn.q_proj.weight", "input_layernorm.weight")
    assert [rename(n, arch.memory) for n in inside] == [rename(n, MEMORY.get(name, ())) for n in inside]


@pytest.mark.parametrize("name", SAID)
def test_numbers_are_those_of_the_configuration(name: str) -> None:
    config = config_of(name)
    family = Family.of(config)
    dense = {"qwen2_moe": [0, 2], "deepseek_v2": [1, 2], "deepseek_v3": [1, 2]}
    assert (family.moe_layers, family.num_experts, family.top_k) == (dense.get(name, [0, 1, 2]), 8, config["num_experts_per_tok"])
    assert family.expert_size == (48 if name == "mixtral" else 24) and family.gated
    assert family.scale == {"deepseek_v2": 1.7, "deepseek_v3": 2.5}.get(name, 1.0)
    assert family.group_limit == ((2, 1) if name.startswith("deepseek") else (1, 1))


@pytest.mark.parametrize("name", tiny.families())
def test_the_tensors_that_looking_finds_are_those_that_are_asked_for(name: str) -> None:
    config = config_of(name)
    answer = looked_at(config)
    config, family, shapes = config | {ARCH: answer.arch.to_json()}, Family.of(config), answer.shapes
    assert shapes is not None
    width, inner = family.size("hidden_size") or 0, family.expert_size or 0
    tables = {i: {n: tuple(s) for n, s in shapes.items() if n.startswith(family.prefix(i))} for i in range(family.num_layers)}
    for layer in family.moe_layers:
        for e in range(family.num_experts):
            gate, up, down = family.expert(layer, e)
            tables[layer] |= {gate: (inner, width), up: (inner, width), down: (width, inner)}
    for layer, table in tables.items():
        check_layer(config, layer, {n: ("F32", shape) for n, shape in table.items()}, shapes)
        with pytest.raises(ValueError, match="has no tensor"):
            check_layer(config, layer, {n: ("F32", shape) for n, shape in [*table.items()][1:]}, shapes)
    check_rest(config, {n: ("F32", tuple(s)) for n, s in shapes.items() if not n.startswith("model.layers.")}, shapes)
