"""Block Drop where kinds of layers take turns: as many neighbours go as make a turn, and each place keeps its kind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.records import TrimmedLayers
from moeflow.methods.trim.steps import Trimming, trim
from moeflow.step import upstream
from tests import layouts, running


@pytest.mark.parametrize("name", ["gpt_oss", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)])
@torch.inference_mode()
def test_neighbours_go_that_make_a_turn(name: str, tmp_path: Path) -> None:
    """Sliding and full attention, which have the same tensors, and linear and full attention, which have not."""
    kind, source, store = layouts.KINDS[name], tmp_path / "model", running.store_in(tmp_path)
    config = kind.config()
    text = config.get_text_config()
    text.num_hidden_layers, text.layer_types = 4, text.layer_types * 2
    layouts.made(kind, config).save_pretrained(source)
    found = replace(kind.found, arch=replace(kind.found.arch, moe=(0, 1, 2, 3)))
    model = layouts.model_in(source, found)
    matrix = data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16))
    calibration = calibrate.run(model, matrix, Pass(batch=4), inputs=False, between=True)
    target = checkpoint.checkpoint_of(trim(calibration, Trimming("decoder_layers", 2)))
    running.run(store, target)
    store.fetch(target.key, tmp_path / "out")
    (chosen,) = (s for s in upstream([target]) if s.name == "trim.decoder_layers")
    gone = TrimmedLayers.read(store.artifact(chosen.key)).drop
    assert gone in ([0, 1], [1, 2], [2, 3])
    cls: Any = getattr(layouts.transformers_, kind.model) if kind.found.layout.inside else AutoModelForCausalLM
    whole, (short, info) = cls.from_pretrained(source).eval(), cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    body = whole.model.language_model if kind.found.layout.inside else whole.model
    body.layers = nn.ModuleList(layer for i, layer in enumerate(body.layers) if i not in gone)
    body.config.num_hidden_layers, body.config.layer_types = 2, body.config.layer_types[:2]
    ids = torch.arange(3, 15)[None]
    torch.testing.assert_close(short.eval()(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
