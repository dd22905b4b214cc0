"""What a model writes is what transformers writes with it, before and after the compression."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.evaluate import steps as evaluate
from tests import running

PROMPT = "    def __init__(self"


def test_both_models_go_on_from_the_same_words(tmp_path: Path) -> None:
    store, model = running.store_in(tmp_path), checkpoint.checkpoint_of(running.model_in(running.SMALL))
    target = evaluate.written(model, model, prompt=PROMPT, tokens=8)
    running.run(store, target)
    report = json.loads(store.artifact(target.key).file("report.json").read_text())
    tokenizer, whole = AutoTokenizer.from_pretrained(running.SMALL), AutoModelForCausalLM.from_pretrained(running.SMALL)
    ids = torch.tensor(tokenizer(PROMPT)["input_ids"])[None]
    for _ in range(8):
        ids = torch.cat([ids, whole(ids).logits[:, -1:].argmax(-1)], 1)
    assert PROMPT + report["original"] == tokenizer.decode(ids[0]) and report["original"] == report["compressed"]
    assert report["notes"] == [
        f"behind {PROMPT!r} the original model writes {report['original']!r}, the compressed one {report['compressed']!r}"
    ]


def test_nothing_to_go_on_from_is_refused(tmp_path: Path) -> None:
    model = checkpoint.checkpoint_of(running.model_in(running.SMALL))
    with pytest.raises(ValueError, match="prompt='' and tokens=8: there must be words"):
        evaluate.written(model, model, prompt="", tokens=8)
