"""Whether an answer is right: the number in it, the calls in it, the code in it; and how far a text repeats itself. No torch."""

import json
import re
from collections.abc import Sequence
from typing import Any

from moeflow.methods.judge.task_files import Item, name_of

NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
IGNORED = [re.compile(pattern) for pattern in (",", r"\$", r"(?s).*#### ", r"\.$")]
"""The two ways in which lm-evaluation-harness finds the number in an answer to GSM8K, and what it takes away before it compares."""
FENCED = re.compile(r"```(?:\w+)?\n(.*?)(?:```|\Z)", re.DOTALL)
TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


def same_number(written: str, answer: str, *, strict: bool = False) -> bool:
    """Whether the last number in what was written is that of the answer, as lm-evaluation-harness's GSM8K decides.

    `strict`: the first number behind "####" (its strict-match) instead of the last one (its flexible-extract).
    """
    if strict:
        match = STRICT.search(written)
        number = match[1] if match else "[invalid]"
    else:
        matches = NUMBER.findall(written)
        number = next((part for part in matches[-1] if part), "[invalid]").strip() if matches else "[invalid]"
    return _plain(number) == _plain(answer)


def _plain(number: str) -> str:
    for pattern in IGNORED:
        number = pattern.sub("", number)
    return number.lower()


def program(written: str, item: Item) -> str:
    """The program that tests an answer: the code in it, behind that of its prompt unless it has it all, and its tests.

    Code in a fenced block is taken out of it. `check(entry_point)` is called where the row names one, as HumanEval's are.
    """
    block = FENCED.search(written)
    code = block[1] if block else written
    whole = block is not None and bool(item.entry_point) and re.search(rf"^def {re.escape(item.entry_point)}\b", code, re.MULTILINE)
    check = f"\ncheck({item.entry_point})\n" if item.entry_point else "\n"
    return f"{'' if whole else item.before}{code}\n\n{item.tests}{check}"


def right_call(written: str, tools: Sequence[dict[str, Any]]) -> bool:
    """Whether an answer calls tools and nothing but the given ones, each with an object of arguments, in JSON that can be read.

    Calls are the objects between <tool_call> and </tool_call>, in a fenced block, or at the beginning of the answer: one, a list,
    or one after the other; each {name, arguments} (or parameters), or the same in "function". What stands behind them is not read.
    """
    names = {name_of(tool) for tool in tools}
    blocks = TAGGED.findall(written) or FENCED.findall(written) or [written]
    calls = [call for block in blocks for call in _calls(block)]
    return bool(calls) and all(_is_call(call, names) for call in calls)


def _calls(text: str) -> list[Any]:
    """The JSON values at the beginning of a text, lists opened; None alone where an object begins that cannot be read."""
    calls: list[Any] = []
    decoder = json.JSONDecoder()
    while (text := text.lstrip())[:1] in ("{", "["):
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return calls if calls and text[0] == "[" else [None]
        calls += value if isinstance(value, list) else [value]
        text = text[end:]
    return calls


def _is_call(call: Any, names: set[Any]) -> bool:
    call = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or call["name"] not in names:
        return False
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return False
    return isinstance(arguments, dict)


def repeated(tokens: Sequence[int], n: int) -> float:
    """The share of a text's runs of `n` tokens that stood in it before; 0 for a text that is shorter."""
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def agreed(first: Sequence[int], second: Sequence[int]) -> int:
    """The tokens until the first difference of two texts."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
