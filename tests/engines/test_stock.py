"""What stock engines read is what is written: words of config.json, and names of tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moeflow.arch.stock import as_engines_read
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.model.header import read_header
from moeflow.model.layout import Folder
from tests import running, tiny

BIASED = {"attention_bias": True, "lm_head_bias": True}


def written(family: str, folder: Path, **changes: Any) -> tuple[Path, Path]:
    """A tiny checkpoint, and the same written by moeflow."""
    source = tiny.write(family, folder / "model", **changes)
    store, made = running.store_in(folder), checkpoint.checkpoint_of(running.model_in(source))
    running.run(store, made)
    store.fetch(made.key, folder / "out")
    return source, folder / "out"


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    "family, changes, key, value",
    [
        ("deepseek_v3", {}, "topk_method", "noaux_tc"),
        ("deepseek_v3", {}, "scoring_func", "sigmoid"),
        ("deepseek_v2", {}, "topk_method", "group_limited_greedy"),
        ("phimoe", BIASED, "architectures", ["PhiMoEForCausalLM"]),
        ("phimoe", {}, "architectures", ["PhimoeForCausalLM"]),
    ],
    ids=["deepseek_v3", "deepseek_v3 scores", "deepseek_v2", "phi", "phi without biases"],
)
@torch.inference_mode()
def test_config_json_says_what_engines_read_and_transformers_loads_the_same(
    family: str, changes: dict[str, Any], key: str, value: Any, tmp_path: Path
) -> None:
    source, out = written(family, tmp_path, **changes)
    assert config(out)[key] == value
    ids = torch.arange(3, 19)[None]
    both = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval()(ids).logits for f in (source, out)]
    assert torch.equal(*both)


def test_an_aliased_family_is_told_too_and_a_said_method_stays() -> None:
    assert as_engines_read({"model_type": "kimi_k2"})["scoring_func"] == "sigmoid"
    said = {"model_type": "moeflow_deepseek_v3", "topk_method": "greedy"}
    assert as_engines_read(said) is said


def test_a_mixtral_has_the_hubs_names_and_no_weight_of_it_is_random(tmp_path: Path) -> None:
    """Under gate_proj, up_proj and down_proj, as llm-compressor writes them, transformers would load random experts."""
    _, out = written("mixtral", tmp_path)
    names = {n for p in out.glob("*.safetensors") for n in read_header(p.name, p.stat().st_size, Folder(out).read)}
    experts = {n.split(".")[-2] for n in names if ".experts." in n}
    assert experts == {"w1", "w2", "w3"}
    both: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(both[1][kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_per_layer_config_would_change_how_transformers_loads_a_family(tmp_path: Path) -> None:
    """Why it is not written beside `moeflow_layers`: when this fails, it may be."""
    source = tiny.write("mixtral", tmp_path / "model")
    told = config(source) | {"per_layer_config": {"0": {"num_local_experts": 6}}}
    (source / "config.json").write_text(json.dumps(told))
    with pytest.raises(Exception, match="num_local_experts|per-layer|per_layer"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
