"""Whole runs over tiny checkpoints whose config.json has what published ones have (`tests/published.py`)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from moeflow.arch.by_layer import EXPERTS, as_numbers
from moeflow.model.structure.building import built, whole
from moeflow.model.structure.names import scrambled
from moeflow.model.structure.tiny import tiny
from moeflow.run import pipeline
from tests import running
from tests.published import PUBLISHED

PIPELINE = Path(__file__).parents[2] / "pipelines" / "mixtral.py"
TEXT = ["calibration.sequences=8", "calibration.length=16", "calibration.batch=4", "heldout.sequences=2", "heldout.length=16"]


def write(name: str, folder: Path) -> Path:
    """A checkpoint with the entries of the published config.json, made smaller; lists by layer stay lists."""
    published = PUBLISHED[name]
    small = tiny(whole(published), heads=False)
    model: Any = built(small)
    scrambled(model, ())
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(small))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_checkpoint_as_published_is_pruned_and_loads(name: str, tmp_path: Path) -> None:
    source, store = write(name, tmp_path / "model"), running.store_in(tmp_path)
    before = json.loads((source / "config.json").read_text())
    texts = [f"{what}={running.matrix_of(tmp_path, seed=seed).spec}" for seed, what in enumerate(("tokens", "heldout"))]
    words = [f"model={source}", *texts, *TEXT, "keep=6", "search=reap"]
    target = running.alone(pipeline.call(pipeline.load(PIPELINE), words))
    running.run(store, target._with(reports=tuple(r for r in target.reports if r.name != "evaluate.speed")))
    store.fetch(target.key, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    kind: Any = AutoModelForImageTextToText if "text_config" in before else AutoModelForCausalLM
    model, info = kind.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    logits = model.eval()(input_ids=torch.arange(3, 40)[None]).logits
    assert torch.isfinite(logits).all()
    same, changed = (as_numbers(one.get("text_config", one)) for one in (before, after))
    none = {"num_mtp_modules", "num_nextn_predict_layers"}  # heads that it does not bring
    assert {k for k in same if changed.get(k) != same[k]} < {*EXPERTS} | none
