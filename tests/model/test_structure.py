"""Model types are found by looking at transformers' own tiny model of each."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from moeflow.arch import Arch, Family, found
from moeflow.model.structure.anatomy import Unknown
from moeflow.model.structure.listing import default, rows, types
from moeflow.model.structure.looking import look
from moeflow.model.structure.tiny import EXPERTS, tiny
from tests import looks

LISTS = Path(__file__).parent / "families"
OFTEN = ("gpt_oss", "qwen3_vl_moe")
KINDS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"score": "softmax", "activation": "clamped_swiglu", "normalize": "always"},
    "qwen3_vl_moe": {"score": "softmax", "normalize": "always"},
    "ernie4_5_moe": {"score": "softmax", "router_bias": "model.layers.{layer}.mlp.moe_statics.e_score_correction_bias"},
    "llama4_text": {"score": "sigmoid", "weighs_input": True},
    "glm4_moe": {"score": "sigmoid", "router_bias": "model.layers.{layer}.mlp.gate.e_score_correction_bias"},
    "hy_v3": {"score": "sigmoid", "scale_key": "router_scaling_factor"},
    "glm_moe_dsa": {"score": "sigmoid", "handed_on": "index_topk"},
    "mistral4": {"score": "softmax"},
    "glm4v_moe": {"score": "sigmoid"},
    "step3p7": {"score": "sigmoid"},
    "qwen3_omni_moe_thinker": {"score": "softmax"},
    "unlimited_ocr": {"score": "softmax"},
    "cohere2_moe": {"norm_feeds_more": True},
    "granitemoehybrid": {"norm_feeds_more": True, "norm": "post_attention_layernorm"},
    "nemotron_h": {"norm_feeds_more": False, "attention": "mixer", "block": "mixer"},
    "nemotron_h_omni": {"score": "sigmoid"},
}


def pinned() -> dict[str, Any]:
    """What was seen with the installed version of transformers: the row of each model type."""
    place = LISTS / f"transformers-{version('transformers')}.json"
    if not place.exists():
        pytest.skip(f"no list is pinned for transformers {version('transformers')}: write {place.name} and read what is new in it")
    listed: dict[str, Any] = json.loads(place.read_text())
    return listed


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in OFTEN else pytest.mark.slow) for n in KINDS])
def test_a_family_is_found_with_its_router_and_proven(name: str) -> None:
    answer = look(default(name))
    assert {k: getattr(answer.arch, k) for k in KINDS[name]} == KINDS[name]
    assert answer.proven["streamed"] == 0.0 and answer.proven["pruned"] < 1e-5
    assert Arch.from_json(json.loads(json.dumps(answer.arch.to_json()))) == answer.arch
    assert any(n.startswith("model.layers.0.") for n in answer.shapes)


def test_a_tiny_configuration_keeps_all_but_its_sizes() -> None:
    config = default("glm4_moe")
    small = tiny(config)
    assert small["n_routed_experts"] == EXPERTS and small["hidden_size"] == 32
    assert {k for k in config if k not in small} <= {"transformers_version", "dtype", "_name_or_path"}
    assert small["norm_topk_prob"] == config["norm_topk_prob"]


def test_sizes_of_a_tiny_configuration_fit_each_other() -> None:
    """A head that is both parts of a latent query, sections of a rotary embedding, and the kind of the last layer."""
    small = tiny(default("mistral4"))
    assert small["head_dim"] == small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    assert tiny(default("deepseek_v3"))["head_dim"] == tiny(default("deepseek_v3"))["qk_rope_head_dim"]
    sections = tiny(default("glm4v_moe"))["text_config"]
    assert 2 * sum(sections["rope_parameters"]["mrope_section"]) == sections["head_dim"] * 0.5
    whole, few = default("gemma4_text")["layer_types"], tiny(default("gemma4_text"))["layer_types"]
    assert few[-1] == whole[-1] and {*few} == {*whole} and len(few) < len(whole)
    assert all(int(k) < len(few) for k in tiny(default("gemma4_text"))["per_layer_config"])
    patches = "projector_patch_to_query_dict"  # numbers that are no layers
    assert tiny(default("aria"))[patches] == default("aria")[patches]


def test_a_multimodal_model_around_any_text_model_is_understood() -> None:
    """As Mistral Small 4 is published: a mistral3, whose own default has no experts. The whole model's tie counts."""
    config = default("mistral3") | {"text_config": default("mistral4")}
    answer = look({k: v for k, v in config.items() if k != "tie_word_embeddings"})
    assert answer.arch.model_type == "mistral4" and answer.layout.inside == ("text_config",)
    assert answer.layout.beside == ("multi_modal_projector.", "vision_tower.")
    assert "lm_head.weight" not in answer.shapes and answer.proven["streamed"] == 0.0


@pytest.mark.slow
def test_what_a_look_found_is_remembered_and_only_the_family_enters_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time nothing is looked at: there is no Python to look with."""
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path))
    monkeypatch.setattr(found, "_looked", looks.AS_IT_IS)
    config = default("mellum")
    first = found.found(config, ["model.layers.0.mlp.gate.weight"], "here")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    assert found.found(config, ["model.layers.0.mlp.gate.weight"], "here") == first
    assert Family(first.arch, config).num_experts == config["num_local_experts"]
    with pytest.raises(FileNotFoundError):
        found.found(config | {"hidden_size": 64}, ["model.layers.0.mlp.gate.weight"], "here")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "gpt2"}, "names no number of experts"),
        ({"model_type": "no_such_moe", "num_experts": 8, "num_experts_per_tok": 2}, "has no model type 'no_such_moe'"),
        ({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": [2, 1]}, "different numbers of experts"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "does not say how many experts"),
    ],
)
def test_what_is_not_understood_is_one_line(config: dict[str, Any], why: str) -> None:
    with pytest.raises(Unknown, match=why) as told:
        look(config)
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_the_command_lists_a_family_and_says_why_another_is_none() -> None:
    words = [sys.executable, "-c", "from moeflow.cli import main; main()", "families", "mixtral", "zaya"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.split()[:2] == ["mixtral", "structure"]
    assert second.split()[:2] == ["zaya", "no"] and "router" in second
    assert done.stderr.splitlines()[-1] == "1 of 2 work"


def test_every_model_type_of_transformers_is_listed() -> None:
    assert set(types()) == set(pinned())


@pytest.mark.slow
def test_every_model_type_works_or_does_not_as_the_list_says() -> None:
    listed = pinned()
    seen = {row.model_type: row.by for row in rows()}
    assert seen == {name: row["by"] for name, row in listed.items()}
    assert sum(by != "no" for by in seen.values()) >= 35


def of(release: str) -> tuple[dict[str, Any], set[str]]:
    """The list of a release, and the model types in it that work."""
    listed = json.loads((LISTS / f"transformers-{release}.json").read_text())
    return listed, {name for name, row in listed.items() if row["by"] != "no" and "why" not in row}


def test_the_documentation_says_what_the_newest_release_brings() -> None:
    (before, worked), (listed, works) = of("5.23.0"), of("5.24.0")
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    (said,) = re.findall(r"With transformers 5\.24 all of these work.*?\n\n", page, re.DOTALL)
    assert set(before) <= set(listed) and worked <= works
    assert set(re.findall(r"`(\w+)`", said)) == set(listed) - set(before)
    new, _, unknown = said.partition(f": {len(works)} of {len(listed)}.")
    assert set(re.findall(r"`(\w+)`", new)) == works - worked and unknown


def test_the_table_in_the_documentation_is_the_list() -> None:
    listed, works = of("5.23.0")
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    rows_ = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    assert set(rows_) - {"model type"} == set(listed)
    assert f"{len(works)} of {len(listed)} work" in page
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"{len(works)} of the {len(listed)} Mixture-of-Experts model types" in readme
