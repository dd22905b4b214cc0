"""What a file of rows is, its columns say; what is no such row is told with its line."""

import json

import pytest

from moeflow.methods.judge.options import Prompts, Tasks
from moeflow.methods.judge.task_files import figure_of, read, shot

CHAT = [{"role": "user", "content": "?"}]


def lines(*rows: object) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def test_the_columns_say_what_a_row_is() -> None:
    kind, (one,) = read("a.jsonl", lines({"question": "1 + 1?", "answer": "#### 2"}))
    assert (kind, one.asked, one.answer) == ("answers", "Question: 1 + 1?\nAnswer:", "#### 2") and "Question:" in one.stop
    kind, (one,) = read("a.jsonl", lines({"prompt": "1 + 1 =", "answer": 2, "stop": ["\n"]}))
    assert (kind, one.asked, one.answer, one.stop) == ("answers", "1 + 1 =", "2", ("\n",))
    kind, (one,) = read(
        "a.jsonl", lines({"prompt": "def f(", "test": "def check(f): f()", "entry_point": "f", "task_id": "HumanEval/0"})
    )
    assert (kind, one.asked, one.before, one.entry_point) == ("code", "def f(", "def f(", "f") and "\ndef" in one.stop
    kind, (one,) = read("a.jsonl", lines({"text": "Add.", "test_list": ["assert a() == 1", "assert b() == 1"], "task_id": 1}))
    assert kind == "code" and "here is your task: Add. Your code should pass these tests:\n\nassert a() == 1\nassert" in str(
        one.asked
    )
    assert one.tests == "assert a() == 1\nassert b() == 1" and one.before == "" and one.stop == ("[DONE]",)
    kind, (one,) = read("a.jsonl", lines({"query": "?", "tools": json.dumps([{"name": "f"}]), "answers": "[]"}))
    assert kind == "calls" and one.asked == CHAT and one.tools == [{"name": "f"}]
    assert read("a.jsonl", lines({"messages": CHAT, "other": 1}))[0] == "prompts"
    assert read("a.jsonl", b"\xef\xbb\xbf" + lines({"prompt": "x"}) + b"\n\n")[0] == "prompts"


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"", "a.jsonl has no rows"),
        (b"\n\n", "a.jsonl has no rows"),
        (b'{"prompt": "x"}\n{"prompt', "a.jsonl, line 2: no JSON"),
        (b"\xff\xfe", "a.jsonl, line 1: no JSON"),
        (b"[1]", "a.jsonl, line 1: the row holds no object"),
        (lines({"answer": "1"}), "line 1: the row has none of the columns messages, prompt, .*; it has answer"),
        (lines({"prompt": ""}), "line 1: the row has nothing in its column 'prompt'"),
        (lines({"prompt": ["x"]}), "line 1: the row has .* in its column 'prompt', which is no text"),
        (lines({"question": "?", "answer": None, "test": ""}), "line 1: the row has the tests '', which are no code"),
        (lines({"question": "?", "answer": {}}), "line 1: the row has {} in its column 'answer', which is no text"),
        (lines({"prompt": "?", "tools": [{}]}), "line 1: the row has tools without a name"),
        (lines({"prompt": "?", "tools": "x"}), "line 1: the row has words in its column 'tools' that are no JSON"),
        (lines({"messages": [{"role": "user"}]}), "line 1: the row has messages without role or content"),
        (lines({"prompt": "?", "stop": [1]}), "line 1: the row has the stop"),
        (lines({"prompt": "?", "answer": "1"}, {"prompt": "?"}), "line 2: the row has the columns of prompts, and .* of answers"),
    ],
)  # fmt: skip
def test_what_is_no_row_is_told_with_its_line(data: bytes, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted) as told:
        read("a.jsonl", data)
    assert "\n" not in str(told.value)


def test_examples_are_the_first_rows_which_are_then_not_asked() -> None:
    _, items = read("a.jsonl", lines(*({"question": f"{i}?", "answer": str(i)} for i in range(3))))
    asked = shot(items, 2, "a.jsonl")
    assert [i.asked for i in asked] == ["Question: 0?\nAnswer: 0\n\nQuestion: 1?\nAnswer: 1\n\nQuestion: 2?\nAnswer:"]
    assert shot(items, 0, "a.jsonl") == items and asked[0].answer == "2"
    _, talks = read("a.jsonl", lines(*({"messages": CHAT, "answer": "1"},) * 2))
    with pytest.raises(ValueError, match="holds messages, into which tasks.shots=1 cannot be put"):
        shot(talks, 1, "a.jsonl")


def test_a_gate_can_name_every_figure() -> None:
    assert figure_of("gsm8k") == "gsm8k" and figure_of("2 words", "acc") == "_2_words"
    assert figure_of("gsm8k", "exact_match", "strict-match", main=False) == "gsm8k.exact_match.strict-match"


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: Tasks(""), "names no task"),
        (lambda: Tasks("a, a"), "a is named twice"),
        (lambda: Tasks("a", limit=0), "limit=0 must be at least 1, or none"),
        (lambda: Tasks("a", shots=-1), "shots=-1 must be at least 0, or none"),
        (lambda: Tasks("a", batch=0), "batch=0 must be at least 1"),
        (lambda: Tasks("a", seconds=0), "seconds=0 must be at least 0.1"),
        (lambda: Tasks("nowhere.yaml").check_files(), "tasks=nowhere.yaml: there is no such file"),
        (lambda: Tasks("a", folder="nowhere").check_files(), "tasks.folder=nowhere: there is no such folder"),
        (lambda: Prompts(" "), "names no file of prompts"),
        (lambda: Prompts("a.jsonl", limit=0), "limit=0 must be at least 1"),
        (lambda: Prompts("a.jsonl", temperature=0), "temperature=0 must lie above 0"),
        (lambda: Prompts("a.txt").check_files(), "prompts=a.txt is no file of rows; it ends in .jsonl"),
        (lambda: Prompts("nowhere.jsonl").check_files(), "prompts=nowhere.jsonl: there is no such file"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(make: object, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        make()
