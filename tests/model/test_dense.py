"""Low-rank matrices multiplied out in a pulled folder, whatever kind of checkpoint it is."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeflow.arch import Family
from moeflow.model.checkpoint import Tensors
from moeflow.model.dense import INDEX, multiply_out, type_multiplied_out
from moeflow.model.formats import config_of, format_of
from moeflow.model.layout import Folder, headers, read_config
from tests import compressed, layouts, normal
from tests.model.test_other_families import some


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("kind", some("llama4", *(k for k in layouts.KINDS if k != "llama4")))
def test_a_folder_without_factors_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    """A multimodal model, and experts in stacks: their config.json names no family that has factors."""
    folder = layouts.write(kind, tmp_path / "model")
    before, size = digests(folder), sum(t.nbytes for t in layouts.raw(folder).values())
    assert multiply_out(folder) == {"matrices": 0, "unpacked": 0, "before": size, "after": size}
    assert digests(folder) == before


def factored(name: str, folder: Path) -> Path:
    """A family's tiny checkpoint whose experts have low-rank down matrices, as many in every layer."""
    source = normal.write(name, folder / "model")
    config, tensors = read_config(Folder(source)), dict(Tensors(source))
    family = Family.of(config)
    for layer in family.moe_layers:
        for expert in range(family.num_experts):
            down = family.expert(layer, expert)[-1]
            cut = compressed.factor(tensors.pop(down), 6)
            tensors |= dict(zip(family.factors(down), (cut.out_MR, cut.in_RN), strict=True))
    shapes = {n: t.shape for n, t in tensors.items()}
    formats = [format_of(shapes, config, i) if i in family.moe_layers else None for i in range(family.num_layers)]
    compressed.write(tensors, config_of(config, formats), folder / "made")
    return folder / "made"


@pytest.mark.parametrize("name, model_type", [("glm4_moe", "glm4_moe"), ("gpt_oss", "moeflow_gpt_oss")])
@torch.inference_mode()
def test_a_family_that_was_looked_at_is_its_own_again_where_transformers_reads_it_matrix_by_matrix(
    name: str, model_type: str, tmp_path: Path
) -> None:
    folder = factored(name, tmp_path)
    before = compressed.load(folder)(compressed.ids()).logits
    names = {n: t.file for n, t in headers(Folder(folder)).items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    assert type_multiplied_out(folder) == model_type, "what it will be is known before"
    assert multiply_out(folder)["matrices"] > 0
    config = read_config(Folder(folder))
    assert config["model_type"] == model_type and ("moeflow_arch" in config) == model_type.startswith("moeflow_")
    both: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = both
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(model.eval()(compressed.ids()).logits, before, rtol=1e-4, atol=1e-4)
