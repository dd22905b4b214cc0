"""Files of rows, one JSON object on a line: questions and answers, code and tests, tools and calls, or prompts alone.

What a file is, its columns say (`KINDS`). All rows of a file are of one kind. No torch.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["answers", "code", "calls", "prompts"]
ASKED = ("messages", "prompt", "question", "query", "text")
"""The columns that may hold what is asked, in the order in which they are looked for."""
KINDS: Mapping[Kind, tuple[str, ...]] = {"calls": ("tools",), "code": ("test", "test_list"), "answers": ("answer",), "prompts": ()}
"""The columns by one of which each kind is known, the first kind that fits; one of `ASKED` is there besides."""
METRICS: Mapping[Kind, tuple[str, ...]] = {
    "answers": ("exact_match", "exact_match,strict"), "code": ("passed",), "calls": ("valid_call",), "prompts": ()
}  # fmt: skip
"""What is measured of each kind of file; the first is the task's figure."""
MBPP = "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
STOPS: Mapping[str, tuple[str, ...]] = {
    "question": ("Question:", "</s>", "<|im_end|>"),
    "prompt": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    "text": ("[DONE]",),
}
"""Where answers end, by the column of the question, as lm-evaluation-harness has it for GSM8K, HumanEval and MBPP."""


@dataclass(frozen=True)
class Item:
    """One row: what is asked, and what the answer is judged by."""

    asked: str | list[dict[str, Any]]  # a text, or messages
    answer: str = ""
    tests: str = ""
    before: str = ""  # code in front of the answer, for its tests
    entry_point: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    begin: str = ""  # with which the answer begins
    stop: tuple[str, ...] = ()


def kind_of(columns: Sequence[str]) -> Kind:
    """What a row with these columns is."""
    return next(kind for kind, needed in KINDS.items() if not needed or set(needed) & {*columns})


def read(name: str, data: bytes) -> tuple[Kind, list[Item]]:
    """The kind of a file and its items. Raises ValueError, with the line, for what is no such file."""
    kind: Kind | None = None
    items = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}, line {number}: no JSON ({error}); write one object on each line") from None
        try:
            if not isinstance(row, dict):
                raise ValueError("holds no object")
            mine = kind_of([c for c, value in row.items() if value is not None])
            if mine != (kind := kind or mine):
                raise ValueError(f"has the columns of {mine}, and the rows before it those of {kind}")
            items.append(_item(row, kind))
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: the row {error}; docs/evaluate.md has the form of each kind") from None
    if kind is None:
        raise ValueError(f"{name} has no rows; write one object on each line")
    return kind, items


def _item(row: Mapping[str, Any], kind: Kind) -> Item:
    column = next((c for c in ASKED if row.get(c) is not None), None)
    if column is None:
        raise ValueError(f"has none of the columns {', '.join(ASKED)}; it has {', '.join(row) or 'none'}")
    asked = _listed(row[column], "messages") if column == "messages" else _text(row, column)
    if kind == "calls" and isinstance(asked, str) and column != "prompt":
        asked = [{"role": "user", "content": asked}]  # so that the chat template tells of the tools
    if not asked and not row.get("begin"):
        raise ValueError(f"has nothing in its column {column!r}")
    stop = row.get("stop", STOPS.get(column, ()) if kind in ("answers", "code") and (column, kind) != ("prompt", "answers") else ())
    if isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop, list | tuple) or not all(isinstance(s, str) and s for s in stop):
        raise ValueError(f"has the stop {stop!r}, which is no list of words")
    tests, before = _tests(row, column, asked) if kind == "code" else ("", "")
    if kind == "code" and column == "text":
        asked = MBPP.format(text=asked, tests=tests)
    if kind == "answers" and column == "question":
        asked = f"Question: {asked}\nAnswer:"
    return Item(
        asked, _text(row, "answer") if kind == "answers" else "", tests, before, _text(row, "entry_point", ""),
        _tools(row["tools"]) if kind == "calls" else [], _text(row, "begin", ""), tuple(stop),
    )  # fmt: skip


def _text(row: Mapping[str, Any], column: str, otherwise: str | None = None) -> str:
    value = row.get(column, otherwise)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"has {value!r} in its column {column!r}, which is no text")
    return value


def _listed(value: Any, column: str) -> list[dict[str, Any]]:
    """A list of objects, which may be JSON in a string."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"has words in its column {column!r} that are no JSON") from None
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise ValueError(f"has no list of objects in its column {column!r}")
    if column == "messages" and not all(isinstance(v.get("role"), str) and "content" in v for v in value):
        raise ValueError("has messages without role or content")
    return value


def _tests(row: Mapping[str, Any], column: str, asked: str | list[dict[str, Any]]) -> tuple[str, str]:
    """The code that tests the answer, and that which goes in front of the answer."""
    tests: Any = row.get("test", row.get("test_list"))
    lines = tests if isinstance(tests, list) else [tests]
    if not lines or not all(isinstance(line, str) and line.strip() for line in lines):
        raise ValueError(f"has the tests {tests!r}, which are no code")
    return "\n".join(lines), asked if column == "prompt" and isinstance(asked, str) else ""


def _tools(value: Any) -> list[dict[str, Any]]:
    """The tools, each with its name, as {name, ...} or {type, function: {name, ...}}."""
    tools = _listed(value, "tools")
    if not tools or not all(isinstance(name_of(tool), str) and name_of(tool) for tool in tools):
        raise ValueError("has tools without a name")
    return tools


def name_of(tool: Mapping[str, Any]) -> Any:
    inside = tool.get("function")
    return inside.get("name") if isinstance(inside, Mapping) else tool.get("name")


def strict(items: Sequence[Item]) -> bool:
    """Whether answers write their number behind "####", as GSM8K's do, so that finding it there is a measure of its own."""
    return any("####" in item.answer for item in items)


def figure_of(task: str, metric: str = "", filter: str = "", *, main: bool = True) -> str:
    """The word by which a gate names a figure: the task's name, and with the metric for its further metrics."""
    words = ".".join(part for part in ((task,) if main else (task, metric, filter)) if part)
    return re.sub(r"^(?=\d)", "_", re.sub(r"[^\w./:-]+", "_", words))


def shot(items: Sequence[Item], shots: int, name: str) -> list[Item]:
    """The items with the first `shots` of them in front of each of the others, as examples.

    Raises ValueError where too few are left, or where they are no questions with answers.
    """
    if not shots:
        return [*items]
    if shots >= len(items):
        raise ValueError(f"{name} has {len(items)} rows, so tasks.shots={shots} leaves none to ask; take fewer")
    if not all(isinstance(item.asked, str) for item in items):
        raise ValueError(f"{name} holds messages, into which tasks.shots={shots} cannot be put; write the examples as messages")
    examples = "".join(f"{item.asked} {item.answer}\n\n" for item in items[:shots])
    return [Item(f"{examples}{i.asked}", i.answer, begin=i.begin, stop=i.stop) for i in items[shots:]]
