"""Each constant of `moeflow.arch.families` beside what structure finds of the same model, and knows nothing of constants."""

import pytest
from transformers import CONFIG_MAPPING

from moeflow.arch import ARCH, FAMILIES, Config, Family
from moeflow.arch.layout import rename
from moeflow.model.asked import check_layer, check_rest
from moeflow.model.structure.looking import look
from tests import tiny


def config_of(name: str) -> Config:
    """The config.json of the family's tiny checkpoint, with groups that a router can be seen to limit."""
    return CONFIG_MAPPING[name](**(tiny.COMMON | tiny.FAMILIES[name])).to_dict()


@pytest.mark.parametrize("name", tiny.families())
def test_structure_finds_what_the_constant_says(name: str) -> None:
    config = config_of(name)
    answer = look(config)
    constant, found = Family.of(config), Family.of(config | {ARCH: answer.arch.to_json()})
    assert constant.arch in FAMILIES and found.arch not in FAMILIES
    for what in ("moe_layers", "num_experts", "top_k", "expert_size", "normalizes", "scale", "group_limit", "gated", "experts_key"):
        assert getattr(found, what) == getattr(constant, what), what
    for field in ("score", "weighs_input", "expert_biases", "block", "block_router", "norm", "attention", "top_k_key"):
        assert getattr(found.arch, field) == getattr(constant.arch, field), field
    if constant.group_limit[0] > 1:
        assert found.arch.group_score == constant.arch.group_score
    layer = constant.moe_layers[-1]
    for names in ("router_tensors", "shared", "shared_gate"):
        assert getattr(found, names)(layer) == getattr(constant, names)(layer), names
    inside = [n.removeprefix(constant.prefix(layer)) for n in answer.shapes if n.startswith(constant.prefix(layer))]
    assert [rename(n, found.arch.memory) for n in inside] == [rename(n, constant.arch.memory) for n in inside]
    assert [found.expert(layer, e) for e in (0, 7)] == [constant.expert(layer, e) for e in (0, 7)]


@pytest.mark.parametrize("name", tiny.families())
def test_the_tensors_that_structure_finds_are_those_that_the_constant_asks_for(name: str) -> None:
    config = config_of(name)
    answer, family = look(config), Family.of(config)
    width, inner = family.size("hidden_size") or 0, family.expert_size or 0
    tables = {i: {n: s for n, s in answer.shapes.items() if n.startswith(family.prefix(i))} for i in range(family.num_layers)}
    for layer in family.moe_layers:
        for e in range(family.num_experts):
            gate, up, down = family.expert(layer, e)
            tables[layer] |= {gate: [inner, width], up: [inner, width], down: [width, inner]}
    for layer, table in tables.items():
        check_layer(config, layer, {n: ("F32", tuple(shape)) for n, shape in table.items()})
    check_rest(config, {n: ("F32", tuple(s)) for n, s in answer.shapes.items() if not n.startswith("model.layers.")})
