"""The trained model in models/mixtral-small has learned something, and it matters which of its experts are taken out."""

import math
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, naee
from moeflow.sources import Texts
from tests import running

TRAINED_ON, HELD_OUT = (Texts(f"python:stdlib/{names}") for names in ("[!s-z]*.py", "[s-z]*.py"))


@torch.inference_mode()
def test_its_tokenizer_and_weights_predict_python() -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(running.SMALL), AutoModelForCausalLM.from_pretrained(running.SMALL)
    text = Path(textwrap.__file__).read_text()  # it was not trained on this file
    ids = torch.tensor(tokenizer(text)["input_ids"])[:512][None]
    assert tokenizer.decode(ids[0]) in text
    loss = float(model(ids, labels=ids).loss)
    assert loss < 4.2 < math.log(len(tokenizer)) - 2


@pytest.mark.slow
def test_naee_keeps_better_experts_than_chance(tmp_path: Path) -> None:
    """On text that neither the training nor the calibration has seen."""
    store, model = running.store_in(tmp_path), running.model_in(running.SMALL)
    matrix = data.tokens(TRAINED_ON, model, Sample(32, 128))
    seen = calibrate.run(model, matrix, Pass(batch=8, shard=32, stage=2))

    def divergence(search: str, seed: int = 0) -> float:
        pruned = naee.prune(seen, 4, Search(search, seed=seed))
        reports = compare.reports(model, pruned, compare.HeldOut(HELD_OUT.spec, 16, 128, bos=False), Pass())
        target = checkpoint.checkpoint_of(pruned).reporting(*(r for r in reports if r.name == "evaluate.quality"))
        running.run(store, *target.reports)
        (found,) = (row for name, row in running.reports(store, target).items() if name.startswith("KL to the original"))
        return float(found["compressed"])

    assert divergence("layerwise") < 0.5 * min(divergence("random", seed) for seed in (0, 1))
