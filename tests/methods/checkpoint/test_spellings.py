"""Checkpoints under each of the names that transformers reads, whatever it writes: a result has its source's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeflow.arch.found import Found
from moeflow.methods.graph import Model
from moeflow.model.structure.anatomy import dissected
from moeflow.model.structure.building import built
from moeflow.model.structure.listing import default
from moeflow.model.structure.looking import look
from moeflow.model.structure.names import scrambled
from moeflow.model.structure.tiny import EXPERTS, tiny
from tests import layouts
from tests.layouts import raw
from tests.methods.checkpoint.test_layouts import pulled, shape, stock

KEEP = [0, 2, 3, 4, 6, 7]
PUBLISHED = ((r"^language_model\.model\.blocks\.", "language_model.model.layers."), (r"^lm_head\.", "language_model.lm_head."))
SPELLINGS: dict[str, tuple[str, bool, tuple[tuple[str, str], ...]]] = {
    "kimi_k25 as published": ("kimi_k25", True, PUBLISHED),
    "kimi_k25 in memory": ("kimi_k25", False, ()),
    "aria in memory": ("aria", False, ()),
    "aria in part": ("aria", True, ((r"^language_model\.model\.", "model.language_model."),)),
    "exaone_moe in part": ("exaone_moe", True, ((r"\.mlp\.e_score", ".mlp.gate.e_score"),)),
    "granitemoe in part": ("granitemoe", True, ((r"\.router\.layer\.", ".router."),)),
}
"""The model type, whether transformers writes it as its original format, and what is then renamed."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if at else []) for at, n in enumerate(SPELLINGS)])
def test_a_result_has_the_names_of_its_source_and_loads_whole(name: str, tmp_path: Path) -> None:
    model_type, original, renamed = SPELLINGS[name]
    model = built(tiny(default(model_type), layers=2))
    scrambled(model, dissected(model, EXPERTS).vectors)
    sources = [tmp_path / "plain", tmp_path / "spelled"]
    for source, form in zip(sources, (True, original), strict=True):
        model.save_pretrained(source, save_original_format=form)
    respell(sources[1] / "model.safetensors", renamed)
    plain, spelled = (pulled(pruned(source), source) for source in sources)
    assert {shape(n) for n in raw(spelled)} == {shape(n) for n in raw(sources[1])} != {shape(n) for n in raw(plain)}
    expected = stock(type(model), plain).state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in stock(type(model), spelled).state_dict().items())


def respell(path: Path, renamed: tuple[tuple[str, str], ...]) -> None:
    def new(name: str) -> str:
        for before, after in renamed:
            name = re.sub(before, after, name)
        return name

    save_file({new(n): t for n, t in load_file(path).items()}, path, metadata={"format": "pt"})


def pruned(source: Path) -> Model:
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    found = Found.from_json(json.loads(json.dumps(look(config, raw(source)).to_json())))
    model = layouts.model_in(source, found)
    return layouts.pruned_to(model, dict.fromkeys(model.moe_layers, KEEP))
