"""Text for fine-tuning: of every example the response is learned, and nothing else, in whatever format it comes."""

import ast
import inspect
import json
import shlex
import shutil
import textwrap
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moeflow.methods.data import conversations
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Model, Sample
from moeflow.run import StepFailed
from moeflow.sources.texts import NAMED, Texts
from tests import running, servers, tiny

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MARKED = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
FORGETFUL = CHATML.replace("m.content }}", "m.content if loop.last else m.content.split('</think>')[-1] }}")  # as of Qwen3
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML  # Gemma
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": " 2\n"},
]

Pretrained = Callable[..., Model]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one for two line breaks: what a text decodes to is the text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate(["<s>", "</s>", "<|im_start|>", "<|im_end|>", *letters, "ĊĊ"])}
    bpe = Tokenizer(BPE(vocabulary, [("Ċ", "Ċ")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)  # type: ignore[assignment]
    more = ["<|im_start|>", "<|im_end|>"]
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", additional_special_tokens=more)


@pytest.fixture(scope="module")
def pretrained(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """A model by the chat template of its tokenizer."""
    plain = tiny.write("mixtral", tmp_path_factory.mktemp("model"), vocab_size=300, max_position_embeddings=512)
    models: dict[str | None, Model] = {}

    def by(template: str | None = None) -> Model:
        if template not in models:
            folder = tmp_path_factory.mktemp("model") / "with"
            shutil.copytree(plain, folder)
            tokenizer.chat_template = template
            tokenizer.save_pretrained(folder)
            models[template] = running.model_in(folder)
        tokenizer.chat_template = template
        return models[template]

    return by


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def made(model: Model, folder: Path, spec: str, **options: Any) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Tokens, what is learned of them, and what each text gave."""
    store = running.store_in(folder)
    step = data.examples(Texts(spec), model, data.Examples(**({"sequences": 4, "length": 100} | options)))
    running.run(store, step)
    artifact = store.artifact(step.key)
    ids, learned = (np.load(artifact.file(n)) for n in ("tokens.npy", "learned.npy"))
    assert ids.dtype == np.int32 and learned.dtype == np.uint8 and ids.shape == learned.shape
    return ids, learned, json.loads(artifact.file("tokens.json").read_text())


def runs(tokenizer: Any, ids: np.ndarray, learned: np.ndarray) -> list[tuple[str, str]]:
    """What is read and what is then learned, one after the other, rows joined."""
    flat, mask = ids.reshape(-1), learned.reshape(-1).astype(int)
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(flat)]
    parts = [tokenizer.decode(flat[a:b]) for a, b in pairwise(borders)]
    if mask[0]:
        parts = ["", *parts]
    return list(zip(parts[::2], parts[1::2], strict=False))


def said(tokenizer: Any, messages: list[dict[str, str]]) -> list[list[str]]:
    """What is learned of a conversation, text by text."""
    responses = []
    for text in conversations.chat(tokenizer, messages):
        ids, learned = conversations.encoded(tokenizer, text)
        responses.append([learnt for _, learnt in runs(tokenizer, np.array(ids), np.array(learned))])
    return responses


def test_of_an_instruction_the_response_and_its_end_are_learned(pretrained: Pretrained, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"instruction": f"Add {i}", "input": "" if i % 2 else f"to {i}", "output": f" {2 * i}\n\nDone."} for i in range(20)]
    spec = f"{jsonl(tmp_path / 'a.jsonl', rows)}#instruction+input+output"
    ids, learned, (about,) = made(pretrained(), tmp_path, spec, sequences=9, length=400)
    assert about["format"] == "instruction" and about["documents"] > 8 and "skipped" not in about
    expected = {
        "<s>" + conversations.instruction(r["instruction"], *[r["input"]] * bool(r["input"])): r["output"] + "</s>" for r in rows
    }
    pairs = runs(tokenizer, ids, learned)[:-1]  # the last may be cut
    assert len(pairs) == len({asked for asked, _ in pairs}) > 8
    assert all(expected[asked] == answer for asked, answer in pairs)


def test_an_instruction_is_in_alpaca_s_words() -> None:
    assert conversations.instruction("Sort.", "b a") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSort.\n\n### Input:\nb a\n\n### Response:\n"
    )
    assert "Input" not in conversations.instruction("Sort.") and "paired" not in conversations.instruction("Sort.")


def test_the_prompt_is_the_tokens_that_the_model_is_given_even_where_the_response_would_change_them(tokenizer: Any) -> None:
    """A response that begins with a line break merges with the prompt's last one, if they are tokenized as one text."""
    prompt, response = conversations.instruction("Break."), "\n\nx"
    asked = conversations.tokenized(tokenizer, prompt)
    assert conversations.tokenized(tokenizer, prompt + response)[: len(asked)] != asked
    ids, learned = conversations.encoded(tokenizer, [(prompt, False), (response, True), ("\n", False), ("\n\ny", True)])
    assert ids[: len(asked)] == asked and learned[: len(asked)] == [0] * len(asked)
    assert [t for _, t in runs(tokenizer, np.array(ids), np.array(learned))] == ["\n\nx", "\n\ny"]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
def test_of_a_conversation_every_answer_and_its_end_are_learned(
    template: str, pretrained: Pretrained, tokenizer: Any, tmp_path: Path
) -> None:
    """Also one that begins with a space or ends with a line break, with a tokenizer that trims such from its offsets."""
    spec = str(jsonl(tmp_path / "a.jsonl", [{"messages": TALK}] * 9)) + "#messages"
    ids, learned, (about,) = made(pretrained(template), tmp_path, spec, length=97)
    assert about["format"] == "chat"
    pairs = runs(tokenizer, ids, learned)[:-1]
    system, first, second = (f"<|im_start|>{t}<|im_end|>\n" for t in ("system\nBe short.", "user\nOne?", "user\nTwo?"))
    ask = "<|im_start|>assistant\n"
    assert pairs[:2] == [(system + first + ask, "1<|im_end|>"), ("\n" + second + ask, " 2\n<|im_end|>")]
    assert pairs[2:4] == [("\n" + system + first + ask, "1<|im_end|>"), pairs[1]] and len(pairs) > 6


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
def test_of_share_gpt_s_spelling_the_same_is_learned(template: str, pretrained: Pretrained, tmp_path: Path) -> None:
    spelled = {"system": "system", "user": "human", "assistant": "gpt"}
    theirs = [{"from": spelled[m["role"]], "value": m["content"]} for m in TALK]
    a = jsonl(tmp_path / "a.jsonl", [{"messages": TALK}] * 9)
    b = jsonl(tmp_path / "b.jsonl", [{"conversations": theirs}] * 9)
    one = made(pretrained(template), tmp_path, str(a), format="chat")
    other = made(pretrained(template), tmp_path, f"{b}#conversations")
    assert (one[0] == other[0]).all() and (one[1] == other[1]).all()


def test_what_nobody_asked_for_is_not_learned_and_what_nobody_answered_is_dropped(pretrained: Pretrained, tokenizer: Any) -> None:
    pretrained(CHATML)
    greeting, late = {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "And?"}
    (text,) = conversations.chat(tokenizer, [greeting, *TALK[1:3], late])
    assert "Hello" in text[0][0] and not any("And?" in part for part, _ in text)
    assert said(tokenizer, [greeting, *TALK[1:3], late]) == [["1<|im_end|>"]]


def test_where_a_template_forgets_earlier_reasoning_every_answer_is_learned_as_it_stood_when_it_was_given(
    pretrained: Pretrained, tokenizer: Any
) -> None:
    pretrained(FORGETFUL)
    thought = [m | {"content": f"so</think>{m['content']}"} if m["role"] == "assistant" else m for m in TALK]
    assert said(tokenizer, thought) == [["so</think>1<|im_end|>"], ["so</think> 2\n<|im_end|>"]]
    first, second = ("".join(part for part, _ in text) for text in conversations.chat(tokenizer, thought))
    assert "so</think>1" in first and "so</think>1" not in second and "\n1<|im_end|>" in second
    assert said(tokenizer, TALK) == [["1<|im_end|>", " 2\n<|im_end|>"]], "where nothing is forgotten it stays one text"


def test_prompts_and_responses_are_rendered_as_a_question_and_its_answer_by_format_chat(
    pretrained: Pretrained, tokenizer: Any, tmp_path: Path
) -> None:
    spec = f"{jsonl(tmp_path / 'a.jsonl', [{'q': 'One?', 'more': 'Now.', 'a': '1'}] * 30)}#q+more+a"
    ids, learned, _ = made(pretrained(CHATML), tmp_path, spec, format="chat")
    asked = "<|im_start|>user\nOne?\n\nNow.<|im_end|>\n<|im_start|>assistant\n"
    assert runs(tokenizer, ids, learned)[:2] == [(asked, "1<|im_end|>"), ("\n" + asked, "1<|im_end|>")]


def test_of_plain_text_every_token_is_learned_and_the_tokens_are_those_of_tokens_of(pretrained: Pretrained, tmp_path: Path) -> None:
    spec = f"{jsonl(tmp_path / 'a.jsonl', [{'text': f'{i} is a number.'} for i in range(99)])}#text"
    ids, learned, _ = made(pretrained(), tmp_path, spec)
    assert learned.all()
    store = running.store_in(tmp_path)
    plain = data.tokens(Texts(spec), pretrained(), Sample(4, 100, eos=True))
    running.run(store, plain)
    assert (np.load(store.artifact(plain.key).file("tokens.npy")) == ids).all()


def test_several_formats_are_mixed_by_weight_and_spread_evenly(pretrained: Pretrained, tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", [{"q": "Why?", "a": "So." * 20}] * 99)
    b = jsonl(tmp_path / "b.jsonl", [{"messages": TALK}] * 99)
    c = jsonl(tmp_path / "c.jsonl", [{"text": "plain"}] * 99)
    ids, learned, about = made(pretrained(CHATML), tmp_path, f"{a}#q+a*2,{b}#messages*1,{c}*1", sequences=16, length=100)
    assert [(p["format"], p["sequences"]) for p in about] == [("instruction", 8), ("chat", 4), ("text", 4)]
    chat, text = (ids == 2).any(1), learned.all(1)
    assert chat[:8].sum() == chat[8:].sum() == text[:8].sum() == text[8:].sum() == 2 and not (chat & text).any()


def test_rows_in_which_nothing_is_learned_are_left_out_and_counted(pretrained: Pretrained, tmp_path: Path) -> None:
    spec = f"{jsonl(tmp_path / 'a.jsonl', [{'q': 'x' * 400, 'a': 'yes'}] * 20)}#q+a"
    store = running.store_in(tmp_path)
    step = data.examples(Texts(spec), pretrained(), data.Examples(9, 50))
    outcome = running.run(store, step)
    assert np.load(store.artifact(step.key).file("learned.npy"))[:, 1:].any(1).all()
    (about,) = json.loads(store.artifact(step.key).file("tokens.json").read_text())
    note = f"a.jsonl: sequences in which nothing is learned: {about['skipped']} left out"
    assert about["skipped"] > 50 and next(s for s in outcome.steps if s.key == step.key).notes == (note,)


def test_what_cannot_be_learned_from_is_left_out_in_words(pretrained: Pretrained, tmp_path: Path) -> None:
    rows = [{"q": "a?", "a": "yes"}] * 5 + [{"q": "b?", "a": " "}, {"q": "b?", "a": None}, {"q": "", "a": "c"}]
    spec = f"{jsonl(tmp_path / 'a.jsonl', rows)}#q+a"
    with pytest.raises(
        StepFailed, match="missing; .*; examples without a response: 2 left out; examples without a prompt: 1 left out"
    ):
        made(pretrained(), tmp_path, spec, sequences=99)
    talks = [TALK, TALK[1:], TALK[:2]]
    spec = f"{jsonl(tmp_path / 'b.jsonl', [{'messages': t} for t in talks])}#messages"
    for reason in ("conversations that the chat template refuses .System role not supported.", "conversations without a response"):
        with pytest.raises(StepFailed, match=f"{reason}: 1 left out"):
            made(pretrained(STRICT), tmp_path, spec, sequences=99)
    *_, (about,) = made(pretrained(STRICT), tmp_path, spec, sequences=1, length=40)
    assert about["documents"] == 1 and sum(about.get("left_out", {}).values()) <= 2


def test_a_text_that_is_too_small_can_be_read_again_in_another_order(pretrained: Pretrained, tmp_path: Path) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    spec = f"{jsonl(tmp_path / 'a.jsonl', [{'text': w} for w in words])}#text"
    with pytest.raises(StepFailed, match=r"tokens are missing; give more text, .* or read it again \(repeat=True\)"):
        made(pretrained(), tmp_path, spec)
    ids, _, (about,) = made(pretrained(), tmp_path, spec, repeat=True)
    size = sum(len(w) + 2 for w in words)
    assert about["documents"] > 50
    first, second = ids.reshape(-1)[:size], ids.reshape(-1)[size : 2 * size]
    assert sorted(first) == sorted(second) and (first != second).any()
    with pytest.raises(ValueError, match="b.jsonl has no text in column 'text': empty rows: 2 left out"):
        made(pretrained(), tmp_path, f"{jsonl(tmp_path / 'b.jsonl', [{'text': ' '}] * 2)}#text", repeat=True)


def test_a_ready_made_matrix_is_taken_whole_without_a_mask(pretrained: Pretrained, tmp_path: Path) -> None:
    step = data.examples(running.matrix_of(tmp_path), pretrained(), data.Examples(99, 99))
    assert step.key == data.tokens(running.matrix_of(tmp_path), pretrained(), Sample(1, 2)).key
    with pytest.raises(ValueError, match="format='chat' needs text, and a ready-made matrix of tokens is none"):
        data.examples(running.matrix_of(tmp_path), pretrained(), data.Examples(1, 2, format="chat"))


def test_the_matrix_stands_where_any_other_can(pretrained: Pretrained, tmp_path: Path) -> None:
    spec = f"{jsonl(tmp_path / 'a.jsonl', [{'q': 'a?', 'a': 'yes'}])}#q+a"
    step = data.examples(Texts(spec), pretrained(), data.Examples(4, 50))
    plain = data.tokens(Texts(spec), pretrained(), Sample(4, 50))
    assert step.spec.output == plain.spec.output and step.spec.writes == plain.spec.writes + 4 * 50 + 128


def test_where_a_text_lies_is_no_part_of_what_is_sampled(pretrained: Pretrained, tmp_path: Path) -> None:
    """Early cutoff: the same file elsewhere gives the same matrix without sampling again."""
    store = running.store_in(tmp_path)
    steps = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        file = jsonl(tmp_path / place / "a.jsonl", [{"q": "a?", "a": "yes"}] * 50)
        steps.append(data.examples(Texts(f"{file}#q+a"), pretrained(), data.Examples(4, 50)))
    running.run(store, steps[0])
    outcome = running.run(store, steps[1])
    assert {s.name for s in outcome.steps if s.state == "run"} == {"sources.files"}


def test_a_format_that_is_said_and_one_that_the_columns_say_are_the_same_recipe(pretrained: Pretrained, tmp_path: Path) -> None:
    model = pretrained(CHATML)

    def key(columns: str, format: str) -> str:
        file = jsonl(tmp_path / "a.jsonl", [{"q": "a?", "a": "yes", "messages": TALK, "text": "b"}])
        return data.examples(Texts(f"{file}{columns}"), model, data.Examples(4, 50, format=format)).key

    assert key("#q+a", "auto") == key("#q+a", "instruction") != key("#q+a", "chat")
    assert key("#messages", "auto") == key("", "chat") and key("", "auto") == key("#text", "text")


@pytest.mark.parametrize(
    "spec, options, says",
    [
        ("#q+a", {"format": "prose"}, "format='prose' is not known; choose one of auto, text, instruction, chat"),
        ("#q", {"format": "instruction"}, "needs the column of a prompt and that of the response, but it names q; write URI#query"),
        ("#q+a", {"length": 513}, "length=513 is more than the model's 512 positions; make sequences shorter"),
        ("#q+a", {"sequences": 0}, "sequences=0 of length=50: there must be at least one"),
    ],
)
def test_what_cannot_be_is_refused_when_the_graph_is_built(
    pretrained: Pretrained, tmp_path: Path, spec: str, options: dict[str, Any], says: str
) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"q": "a?", "a": "yes"}])
    with pytest.raises(ValueError, match=says) as caught:
        data.examples(Texts(f"{file}{spec}"), pretrained(), data.Examples(**({"sequences": 4, "length": 50} | options)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec, template, says",
    [
        ("#q+answer", None, "a.jsonl has no column 'answer'; it has: q, a, messages .write URI#column."),
        ("#messages", None, "the tokenizer has no chat template; put the chat_template.jinja of the model's chat version beside"),
        ("#q+messages", CHATML, "column 'messages' of a.jsonl holds a list and no text; name another"),
        ("#q", CHATML, "column 'q' of a.jsonl holds no messages .*; name another .URI#column."),
    ],
)
def test_what_a_look_at_the_text_tells_is_one_line_when_the_graph_is_built(
    pretrained: Pretrained, tmp_path: Path, spec: str, template: str | None, says: str
) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"q": "a?", "a": "yes", "messages": TALK}])
    format: Any = "chat" if spec == "#q" else "auto"
    with pytest.raises(ValueError, match=says) as caught:
        data.examples(Texts(f"{file}{spec}"), pretrained(template), data.Examples(4, 500, format=format))
    assert "\n" not in str(caught.value)


def test_too_little_text_is_told_with_what_is_missing(pretrained: Pretrained, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"q": "a?", "a": "yes"}])
    says = "a.jsonl gives 0 of 4 sequences of 500 tokens: 2,000 tokens are missing; give more text, fewer"
    with pytest.raises(StepFailed, match=says) as caught:
        made(pretrained(CHATML), tmp_path, f"{file}#q+a", length=500)
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Hub]:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with servers.hub_server() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def test_known_data_sets_are_had_by_name_each_in_its_format(pretrained: Pretrained, hub: servers.Hub, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": ["x"] * 40, "messages": [TALK] * 40}), tmp_path / "t.parquet")
    hub.put("datasets/allenai/tulu-3-sft-mixture", {"data/train-00000-of-00001.parquet": (tmp_path / "t.parquet").read_bytes()})
    rows = [{"query": f"{i}?", "response": "yes", "type": "x"} for i in range(40)]
    hub.put("datasets/meta-math/MetaMathQA", {"MetaMathQA-395K.json": json.dumps(rows).encode(), "README.md": b"x"})
    *_, about = made(pretrained(CHATML), tmp_path, "metamathqa*3,tulu3", sequences=8, length=50)
    assert [(p["columns"], p["format"], p["sequences"]) for p in about] == [
        (["query", "response"], "instruction", 6),
        (["messages"], "chat", 2),
    ]
    model = pretrained(CHATML)
    named, spelled = (Texts(t) for t in ("metamathqa", f"{NAMED['metamathqa'].uri}#query+response"))
    assert len({data.examples(t, model, data.Examples(8, 50)).key for t in (named, spelled)}) == 1
    with pytest.raises(ValueError, match="tulu-3-sft-mixture@.* holds conversations, not text; name a column of text"):
        data.examples(Texts("tulu3"), model, data.Examples(8, 50, format="text"))


def test_of_functions_and_their_docstrings_exactly_the_functions_are_learned(tmp_path: Path) -> None:
    """With a tokenizer that was trained on Python, which merges across line breaks and indentation."""
    parsed = [(text, node) for m in (ast, shlex, textwrap) for text in [inspect.getsource(m)] for node in ast.walk(ast.parse(text))]
    functions = [(text, node) for text, node in parsed if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)]
    rows = [{"doc": ast.get_docstring(node)[:200], "code": ast.get_source_segment(text, node)} for text, node in functions]  # type: ignore[index]
    spec = f"{jsonl(tmp_path / 'functions.jsonl', rows)}#doc+code"
    ids, learned, (about,) = made(running.model_in(running.SMALL), tmp_path, spec, sequences=12, length=512)
    assert "skipped" not in about and about["documents"] > 8
    expected = {(f"<s>{conversations.instruction(r['doc'].strip())}", f"{r['code']}</s>") for r in rows}
    pairs = runs(AutoTokenizer.from_pretrained(running.SMALL), ids, learned)
    assert about["documents"] - 1 <= len(pairs) <= about["documents"]
    assert set(pairs[:-1]) <= expected, "the last may be cut"
