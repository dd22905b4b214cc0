"""A conversation becomes exactly what `apply_chat_template` gives for it, in calibration and fine-tuning, from whatever file."""

import gzip
import hashlib
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from moeflow.methods.data import steps as data
from moeflow.methods.graph import Model, Sample
from moeflow.run import StepFailed
from moeflow.sources import Texts
from moeflow.sources.texts import MIXTURES
from tests import running, tiny

TEMPLATE = """{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content or [] %}{{ part.text }}{% endfor %}{% endif %}
{%- for call in m.tool_calls or [] %}<call>{{ call.function.name }}({{ call.function.arguments | tojson }})</call>{% endfor -%}
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
STRICT = """{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no role ' + m.role) }}{% endif %}
{{- m.content + '\n' }}{% endfor %}"""
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "count", "parameters": {"properties": {"b": {"default": None}}, "required": ["b"]}}},
]
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Find x"}, {"role": "assistant", "content": None, "tool_calls": [
        {"function": {"name": "find", "arguments": {"a": "x", "limit": None}}}]},
        {"role": "tool", "content": "none", "name": None}, {"role": "assistant", "content": "Nothing."}], "tools": TOOLS},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Count "}, {"type": "text", "text": "y"}]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "count", "arguments": {"b": [1, {"c": 2.5}]}}}]}],
     "tools": TOOLS[1:]},
    {"messages": [{"role": "user", "content": "Hello é\u2028"}, {"role": "assistant", "content": " Hi\n"}], "tools": None},
    {"messages": [{"role": "user", "content": "Late"}, {"role": "assistant", "content": "Yes"}], "id": {"any": "thing"}},
]  # fmt: skip

Pretrained = Callable[[str], Model]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: what a text decodes to is the text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(BPE({t: i for i, t in enumerate(["<s>", "</s>", "<|im_start|>", "<|im_end|>", *letters])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=bpe, additional_special_tokens=["<|im_start|>", "<|im_end|>"])


@pytest.fixture(scope="module")
def pretrained(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """A model by its chat template. Its tokenizer has no beginning-of-sequence token."""

    def by(template: str) -> Model:
        folder = tiny.write("mixtral", tmp_path_factory.mktemp("model"), vocab_size=300, max_position_embeddings=4096)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return running.model_in(folder)

    return by


@pytest.fixture(scope="module")
def model(pretrained: Pretrained) -> Model:
    return pretrained(TEMPLATE)


def expected(tokenizer: Any, row: dict[str, Any]) -> str:
    tokenizer.chat_template = TEMPLATE
    text: str = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
    return text


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def calibrated(model: Model, folder: Path, spec: str, sequences: int, length: int) -> np.ndarray:
    store, step = running.store_in(folder), data.tokens(Texts(spec), model, Sample(sequences, length))
    running.run(store, step)
    return np.load(store.artifact(step.key).file("tokens.npy"))


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def packed(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_bytes(lzma.compress(b"\xef\xbb\xbf" + "".join(json.dumps(r) + "\r\n" for r in rows).encode()))
    return path


def as_strings(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Conversations and tools as JSON in a string, as some data sets keep them from Arrow."""
    return jsonl(path, [{k: json.dumps(v) if k != "id" else v for k, v in row.items()} for row in rows])


@pytest.mark.parametrize("use", ["calibration", "fine-tuning"])
@pytest.mark.parametrize("write, name", [(jsonl, "a.jsonl"), (packed, "a.jsonl.xz"), (as_strings, "a.json")])
@pytest.mark.parametrize("row", range(len(ROWS)))
def test_a_row_is_what_the_chat_template_makes_of_the_same_json(
    row: int, write: Callable[..., Path], name: str, use: str, model: Model, tokenizer: Any, tmp_path: Path
) -> None:
    """Beside another row with tools, whose arguments differ."""
    text = expected(tokenizer, ROWS[row])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    others = [{"messages": None, "tools": [{"other": {"x": None}}]}]
    spec = f"{write(tmp_path / name, [*others, ROWS[row]])}#messages+tools"
    if use == "calibration":
        (made,) = calibrated(model, tmp_path, spec, 1, len(ids))
    else:
        store, step = running.store_in(tmp_path), data.examples(Texts(spec), model, data.Examples(1, len(ids), repeat=True))
        running.run(store, step)
        (made,) = np.load(store.artifact(step.key).file("tokens.npy"))
    assert tokenizer.decode(made) == text and made.tolist() == ids


def test_from_parquet_a_row_has_no_argument_that_only_others_have(model: Model, tokenizer: Any, tmp_path: Path) -> None:
    calls = [{"name": "find", "arguments": {"a": "x"}}, {"name": "count", "arguments": {"b": 1, "c": {"d": "e"}}}]
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [{"function": call}]}]}
        for call in calls
    ]
    texts = [expected(tokenizer, row) for row in rows]
    length = len(tokenizer("".join(texts))["input_ids"])
    made = calibrated(model, tmp_path, f"{parquet(tmp_path / 'a.parquet', rows)}#messages", 1, length)
    assert tokenizer.decode(made[0]) in ("".join(texts), "".join(reversed(texts))) and "null" not in "".join(texts)


def test_of_a_conversation_with_tools_the_assistant_s_turns_are_learned(model: Model, tokenizer: Any, tmp_path: Path) -> None:
    ids = tokenizer(expected(tokenizer, ROWS[0]), add_special_tokens=False)["input_ids"]
    spec, store = f"{jsonl(tmp_path / 'a.jsonl', ROWS[:1])}#messages+tools", running.store_in(tmp_path)
    step = data.examples(Texts(spec), model, data.Examples(1, len(ids)))
    running.run(store, step)
    learned = np.load(store.artifact(step.key).file("learned.npy"))[0].astype(bool)
    said = tokenizer.decode(np.array(ids)[learned])
    assert said == '<call>find({"a": "x", "limit": null})</call><|im_end|>Nothing.<|im_end|>'


def test_what_the_template_refuses_is_skipped_counted_and_said(pretrained: Pretrained, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}]
    rows = [{"messages": talk}] * 30 + [
        {"messages": [{"role": "tool", "content": "b"}]}, {"messages": [{"role": "user", "content": 7}]}, {"messages": None},
        {"messages": []}, {"messages": [{"content": "c"}]}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
    ]  # fmt: skip
    store, spec = running.store_in(tmp_path), f"{jsonl(tmp_path / 'a.jsonl', rows)}#messages"
    step = data.tokens(Texts(spec), pretrained(STRICT), Sample(1, 60))
    outcome = running.run(store, step)
    (about,) = json.loads(store.artifact(step.key).file("tokens.json").read_text())
    left_out, (note, *more) = about["left_out"], next(s for s in outcome.steps if s.key == step.key).notes
    assert about["documents"] == 30 and sum(left_out.values()) == 7
    assert {why.partition(" (")[0]: n for why, n in left_out.items()} == {
        "conversations that the chat template refuses": 3,
        "rows without messages": 2,
        "conversations with a message that has no role": 1,
        "texts with half a character, which no tokenizer takes": 1,
    }
    assert note.startswith("a.jsonl: conversations that the chat template refuses (") and note.endswith("and others): 3 left out")
    assert len(more) == 3
    with pytest.raises(
        StepFailed, match="tokens are missing; .*; conversations that the chat template refuses .*: 3 left out; "
    ) as caught:
        calibrated(pretrained(STRICT), tmp_path, spec, 2, 60)
    assert "\n" not in str(caught.value)


def test_content_in_parts_that_a_template_prints_as_a_list_stays_and_is_said(pretrained: Pretrained, tmp_path: Path) -> None:
    plain = pretrained("{% for m in messages %}{{ m.content }}{% endfor %}")
    spec = f"{jsonl(tmp_path / 'a.jsonl', ROWS[1:2])}#messages"
    store, step = running.store_in(tmp_path), data.tokens(Texts(spec), plain, Sample(1, 50))
    (note,) = next(s for s in running.run(store, step).steps if s.key == step.key).notes
    assert note == "a.jsonl: conversations whose content in parts the chat template prints as a list: 1"


@pytest.mark.parametrize(
    "rows, spec, says",
    [
        ([{"messages": "hello"}], "messages", r"column 'messages' of a.jsonl holds no messages .*; name another \(URI#column\)"),
        ([ROWS[0], {"messages": {"role": "x"}}], "messages", "holds no messages ..role, content. or .from, value.. in line 2"),
        ([ROWS[0], {"messages": ["hello"]}], "messages", "holds no messages .* in line 2; name another"),
        ([ROWS[0], {"messages": [], "tools": "find"}], "messages+tools", r"column 'tools' of a.jsonl holds no tools .* in line 2"),
        ([{"messages": []}], "messages+tool", "a.jsonl has no column 'tool'; it has: messages"),
        ([{"q": "?", "a": ["b"]}], "q+a", "column 'a' of a.jsonl holds a list and no text; name another .*, or correct line 1"),
    ],
)
def test_a_value_that_is_no_conversation_is_told_with_its_line(
    rows: list[dict[str, Any]], spec: str, says: str, model: Model, tmp_path: Path
) -> None:
    file = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=says) as caught:
        data.tokens(Texts(f"{file}#{spec}"), model, Sample(1, 9))
    assert "\n" not in str(caught.value)


def test_a_third_column_beside_messages_and_tools_is_refused_when_the_graph_is_built(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="beside messages there may be a column of tools, and not id"):
        data.tokens(Texts(f"{jsonl(tmp_path / 'a.jsonl', ROWS)}#messages+tools+id"), model, Sample(1, 9))


def test_a_template_that_is_broken_is_one_line(pretrained: Pretrained, tmp_path: Path) -> None:
    spec = f"{jsonl(tmp_path / 'a.jsonl', ROWS)}#messages"
    with pytest.raises(StepFailed, match=r"the tokenizer's chat template cannot be read \(line 1: .*\); put a correct"):
        calibrated(pretrained("{% for m in messages %}"), tmp_path, spec, 1, 9)


def cached(cache: Path, repo: str, files: dict[str, bytes]) -> None:
    """A data set's files as the hub's cache holds them."""
    at, commit = cache / f"datasets--{repo.replace('/', '--')}", "ab" * 20
    for name, content in files.items():
        blob, link = at / "blobs" / hashlib.sha256(content).hexdigest(), at / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
    (at / "refs").mkdir()
    (at / "refs" / "main").write_text(commit)


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data sets of every mixture, each with rows of its own form, in the hub's cache; the hub itself is away."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    talk = [{"role": "user", "content": "Think"}, {"role": "assistant", "content": "<think>t</think>done"}]
    called = [
        talk[0],
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "bash", "arguments": {"c": "ls"}}}]},
    ]
    xlam = {
        "id": 1, "query": "Where?", "answers": json.dumps([{"name": "find", "arguments": {"a": "x", "n": None}}]),
        "tools": json.dumps([{"name": "find", "description": "Finds.", "parameters": {"a": {"type": "str", "default": None}}}]),
    }  # fmt: skip
    for repo, files in {
        "theblackcat102/evol-codealpaca-v1": {"train.jsonl": b'{"instruction": "Sort", "output": "sorted()"}\n' * 99},
        "Salesforce/xlam-function-calling-60k": {
            "README.md": b"x",
            "xlam_function_calling_60k.json": json.dumps([xlam] * 99).encode(),
        },
        "SWE-bench/SWE-smith-trajectories": {
            "data/tool-00000-of-00001.parquet": parquet_bytes([{"messages": json.dumps(called), "resolved": True}] * 99),
            "data/xml-00000-of-00001.parquet": b"not asked for",
        },
        "open-r1/Mixture-of-Thoughts": {
            f"{part}/train-00000-of-00001.parquet": parquet_bytes([{"messages": talk, "num_tokens": 1}] * 99)
            for part in ("all", "code", "math", "science")
        },
        "allenai/c4": {"en/c4-train.00000-of-01024.json.gz": gzip.compress(b'{"text": "Prose, prose, prose.", "url": "u"}\n' * 99)},
    }.items():
        cached(tmp_path / "hub", repo, files)
    return tmp_path / "hub"


def test_a_question_and_its_calls_are_rendered_with_their_tools(
    hub_cache: Path, model: Model, tokenizer: Any, tmp_path: Path
) -> None:
    tool = {"name": "find", "description": "Finds.", "parameters": {"a": {"type": "str", "default": None}}}
    schema = {"type": "function", "function": tool | {"parameters": {"type": "object", "properties": tool["parameters"]}}}
    call = {"type": "function", "function": {"name": "find", "arguments": {"a": "x", "n": None}}}
    asked = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = expected(tokenizer, {"messages": asked, "tools": [schema]})
    (made,) = calibrated(model, tmp_path, "xlam", 1, len(tokenizer(text)["input_ids"]))
    assert tokenizer.decode(made) == text and '<call>find({"a": "x", "n": null})</call>' in text


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_has_its_share_of_every_data_set_rendered_as_it_is_asked(
    name: str, hub_cache: Path, model: Model, tokenizer: Any, tmp_path: Path
) -> None:
    marks = {
        "evol-codealpaca": "sorted()", "xlam": "<call>find", "swe-smith": "<call>bash", "c4-en": "Prose, ",
        "thoughts-code": "<think>", "thoughts-math": "<think>", "thoughts-science": "<think>",
    }  # fmt: skip
    total = sum(MIXTURES[name].values())
    store, step = running.store_in(tmp_path), data.tokens(Texts(name), model, Sample(2 * total, 400))
    running.run(store, step)
    about = json.loads(store.artifact(step.key).file("tokens.json").read_text())
    assert [a["sequences"] for a in about] == [2 * w for w in MIXTURES[name].values()] and not any("left_out" in a for a in about)
    rows = [tokenizer.decode(row) for row in np.load(store.artifact(step.key).file("tokens.npy"))]
    for mark in {marks[one] for one in MIXTURES[name]}:
        assert sum(mark in row for row in rows) == 2 * sum(w for one, w in MIXTURES[name].items() if marks[one] == mark)
