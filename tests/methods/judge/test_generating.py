"""What is written in a batch is what transformers writes alone, and drawn words come as often as the model says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeflow.methods.judge.generating import Drawing, Writer
from moeflow.methods.judge.task_files import read
from tests import running

PROMPTS = ["    def __init__(self", "import", "def f(x):\n    if x:\n        return Tr", "for i in ran"]
TEMPLATE = (
    "{% for t in tools or [] %}# {{ t.name }}\n{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def unheard(*_: object) -> None:
    """Nobody listens how far it is."""


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer(running.SMALL, "auto")


def test_a_batch_is_what_transformers_writes_one_by_one(writer: Writer) -> None:
    prompts = [writer.prompt(p, [], "", chat=False) for p in PROMPTS]
    written = writer.written(prompts, [[]] * 4, 10, 3, unheard)
    tokenizer, whole = AutoTokenizer.from_pretrained(running.SMALL), AutoModelForCausalLM.from_pretrained(running.SMALL)
    for prompt, one in zip(PROMPTS, written, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = whole.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=1)[0, ids.shape[1] :].tolist()
        out = out[: out.index(1)] if 1 in out else out
        assert one.tokens == out and one.text == tokenizer.decode(out, skip_special_tokens=True)


def test_a_text_ends_where_it_is_to_stop_and_a_long_prompt_loses_its_beginning(writer: Writer) -> None:
    prompts = [writer.prompt(p, [], "", chat=False) for p in PROMPTS]
    whole, cut = (writer.written(prompts, [stops] * 4, 10, 4, unheard) for stops in ([], ["(", "se"]))
    for before, after in zip(whole, cut, strict=True):
        assert after.text == min((before.text.split(stop)[0] for stop in ("(", "se")), key=len)
        assert after.tokens == before.tokens[: len(after.tokens)]
    assert any(len(after.tokens) < len(before.tokens) for before, after in zip(whole, cut, strict=True))
    long = writer.prompt("import os\n" * 400, [], "", chat=False)
    one, other = writer.written([long, long[-(writer.positions - 5) :]], [[], []], 5, 1, unheard)
    assert one == other and one.tokens


def test_words_are_drawn_as_often_as_the_model_says_and_alike_whatever_is_beside_them(writer: Writer) -> None:
    (prompt,) = (writer.prompt(PROMPTS[0], [], "", chat=False),)
    drawn = writer.written([prompt] * 512, [[]] * 512, 1, 64, unheard, Drawing(0.7, 1))
    with torch.inference_mode():
        said = (writer.model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(torch.tensor([one.tokens[0] for one in drawn if one.tokens]), minlength=len(said)) / 512
    assert float((counts - said).abs().max()) < 4 * (0.25 / 512) ** 0.5
    again = writer.written([prompt] * 5, [[]] * 5, 1, 2, unheard, Drawing(0.7, 1))
    assert again == drawn[:5]
    assert writer.written([prompt] * 64, [[]] * 64, 1, 64, unheard, Drawing(0.7, 2)) != drawn[:64]


def test_messages_and_tools_go_through_the_models_chat_template(tmp_path: Path) -> None:
    shutil.copytree(running.SMALL, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    writer = Writer(tmp_path / "chat", "auto")
    _, (item,) = read("calls.jsonl", json.dumps({"query": "Which?", "tools": [{"name": "get"}], "begin": "{"}).encode())
    ids = writer.prompt(item.asked, item.tools, item.begin, chat=False)
    assert writer.tokenizer.decode(ids) == "# get\nuser: Which?\nassistant: {"
    assert writer.tokenizer.decode(writer.prompt("Why?", [], "", chat=True)) == "user: Why?\nassistant: "
    with pytest.raises(ValueError, match="the tokenizer has no chat template, which messages need"):
        Writer(running.SMALL, "auto").prompt([{"role": "user", "content": "?"}], [], "", chat=False)
