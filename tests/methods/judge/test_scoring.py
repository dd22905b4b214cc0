"""Numbers are found as lm-evaluation-harness finds them for GSM8K, and calls are JSON that names a given tool."""

import pytest

from moeflow.methods.judge.scoring import agreed, program, repeated, right_call, same_number
from moeflow.methods.judge.task_files import Item

TOOLS = [{"name": "get"}, {"type": "function", "function": {"name": "put"}}]


@pytest.mark.parametrize(
    ("written", "answer", "flexible", "strict"),
    [
        ("so it is 72", "48+24 = <<48+24=72>>72\n#### 72", True, False),
        ("#### 72 and more 9", "#### 72", False, True),
        ("#### 1,000.", "#### 1000", True, True),
        ("that makes $1,000.", "1000", True, False),
        ("-3", "#### -3", True, False),
        ("3 or 4", "#### 3", False, False),
        ("no number", "#### 3", False, False),
        ("", "#### 3", False, False),
    ],
)
def test_the_number_in_an_answer_is_found_as_the_harness_does(written: str, answer: str, flexible: bool, strict: bool) -> None:
    assert (same_number(written, answer), same_number(written, answer, strict=True)) == (flexible, strict)


@pytest.mark.parametrize(
    "written",
    [
        '{"name": "get", "arguments": {}}',
        ' \n{"name": "put", "parameters": {"a": [1]}} and then words',
        '[{"name": "get", "arguments": {}}, {"name": "put", "arguments": {"a": 1}}]',
        '{"name": "get", "arguments": {}}\n{"name": "get", "arguments": {}}',
        'I call it. <tool_call>\n{"name": "get", "arguments": {"a": 1}}\n</tool_call><tool_call>{"name": "put", "arguments": {}}',
        'Here:\n```json\n{"function": {"name": "get", "arguments": "{\\"a\\": 1}"}}\n```',
    ],
)
def test_a_call_is_right_if_it_is_json_that_names_a_given_tool(written: str) -> None:
    assert right_call(written, TOOLS)


@pytest.mark.parametrize(
    "written",
    [
        "",
        "I cannot.",
        '{"name": "get", "arguments": {}',
        '{"name": "delete", "arguments": {}}',
        '{"name": "get"}',
        '{"arguments": {}}',
        '{"name": "get", "arguments": 3}',
        '{"name": "get", "arguments": "no JSON"}',
        "[]",
        "[1]",
        '{"name": ["get"], "arguments": {}}',
        '[{"name": "get", "arguments": {}}, {"name": "delete", "arguments": {}}]',
        "{'name': 'get', 'arguments': {}}",
        '<tool_call>{"name": "get"</tool_call>',
        "[" * 100_000,
        '{"name": "get", "arguments": {}} {"name": "get", ',
    ],
)
def test_what_is_no_such_call_is_wrong(written: str) -> None:
    assert not right_call(written, TOOLS)


def test_the_program_that_tests_an_answer_is_its_prompt_the_code_in_it_and_the_tests() -> None:
    item = Item("def f(x):\n", tests="def check(f):\n    assert f(1) == 2", before="def f(x):\n", entry_point="f")
    for written in (
        "    return x + 1",
        "```python\n    return x + 1\n```\nThis adds one.",
        "```\ndef f(x):\n    return x + 1\n```",
    ):
        exec(program(written, item), {})
    with pytest.raises(AssertionError):
        exec(program("    return x", item), {})


def test_repetition_is_the_share_of_runs_that_stood_before_and_agreement_ends_at_the_first_difference() -> None:
    assert repeated([1, 2, 3, 4], 2) == 0 and repeated([1, 2, 1, 2, 1], 2) == 0.5 and repeated([1], 2) == 0
    assert repeated([7] * 9, 4) == pytest.approx(5 / 6)
    assert agreed([1, 2, 3], [1, 2, 4]) == 2 and agreed([1], [1, 2]) == 1 and agreed([], [1]) == 0
