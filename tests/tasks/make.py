"""Make the small tasks beside this file, which the model in models/mixtral-small can do, from the standard library's sources.

    python -m tests.tasks.make

Only files that it was not trained on (s to z) are taken. Another Python has other sources and gives other tasks, so what counts is
what lies here. `closing` and `order` are data of lm-evaluation-harness's tasks of that name; the others are files of rows
(docs/evaluate.md).
"""

import json
import re
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
BEFORE = 6
"""Lines of code in front of what is asked."""
CLOSING = [")", "]", "}", '"']
NUMBER = re.compile(r"(?<=\[)\d(?=\])|(?<=\[-)\d(?=\])")
Row = dict[str, Any]


def places(random: Random, sources: list[list[str]]) -> Iterator[tuple[str, str]]:
    """A few lines of code and the line behind them, at random places; no line is asked twice."""
    asked = set()
    while True:
        lines = random.choice(sources)
        at = random.randrange(BEFORE, max(BEFORE + 1, len(lines)))
        before = "\n".join(lines[at - BEFORE : at])
        if at < len(lines) and len(before) < 300 and lines[at].strip() and lines[at] not in asked:
            asked.add(lines[at])
            yield before, lines[at]


def closing(random: Random, sources: list[list[str]]) -> Iterator[Row]:
    """Code that breaks off in front of a closing sign, each of four as often as the others; which one is it?"""
    left = dict.fromkeys(CLOSING, 20)
    for before, line in places(random, sources):
        for sign in CLOSING:
            at = line.find(sign)
            if at > 8 and left[sign]:
                left[sign] -= 1
                yield {"code": f"{before}\n{line[:at]}", "choices": CLOSING, "right": CLOSING.index(sign)}
                break
        if not any(left.values()):
            return


def order(random: Random, sources: list[list[str]]) -> Iterator[Row]:
    """Code, and the line behind it with its words in four orders; which is the author's?"""
    for before, line in places(random, sources):
        words, indent = line.split(), line[: len(line) - len(line.lstrip())]
        lines = [line]
        for _ in range(20):
            random.shuffle(words)
            if (other := indent + " ".join(words)) not in lines and len(lines) < 4:
                lines.append(other)
        if len(lines) == 4:
            random.shuffle(lines)
            yield {"code": before, "lines": lines, "right": lines.index(line)}


def numbers(random: Random, sources: list[list[str]]) -> Iterator[Row]:
    """Code that breaks off in front of an index of one digit; which one is it?"""
    for before, line in places(random, sources):
        if match := NUMBER.search(line):
            yield {"prompt": f"{before}\n{line[: match.start()].rstrip(' ')}", "answer": match[0], "stop": ["\n", *",)]:"]}


def code(random: Random) -> Iterator[Row]:
    """The beginning of a function that returns True or False, cut within that word, and a test that needs all of it."""
    for name in ("check", "test", "is_open", "isfile", "match", "closed"):
        for word, cut in (("False", 3), ("True", 2)):
            for condition in ("if x:", "if not x:"):
                other = str(word != "True")
                yield {
                    "prompt": f"def {name}(x):\n    {condition}\n        return {other}\n    return {word[:cut]}",
                    "test": f"assert {name}({int(condition != 'if x:')}) is {word}",
                    "stop": ["\n"],
                }


def calls(random: Random) -> Iterator[Row]:
    """A call of a tool that breaks off within its arguments, to be closed as JSON."""
    names = ["get", "read", "write", "open", "find", "send"]
    for name in names:
        for inner in ("", '"a": {', '"x": {', '"path": {'):
            yield {
                "prompt": "{{}}{{}}\n",
                "begin": f'{{"name": "{name}", "arguments": {{{inner}',
                "tools": [{"name": n} for n in names],
                "stop": ["\n"],
            }


def prompts(random: Random, sources: list[list[str]]) -> Iterator[Row]:
    """Code to go on from."""
    for before, line in places(random, sources):
        yield {"prompt": f"{before}\n{line}"}


def main() -> None:
    sources = [path.read_text().splitlines() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[s-z]*.py"))]
    made = {
        "closing": closing(Random(0), sources),
        "order": islice(order(Random(1), sources), 60),
        "numbers": islice(numbers(Random(2), sources), 40),
        "code": islice(code(Random(3)), 24),
        "calls": islice(calls(Random(4)), 24),
        "prompts": islice(prompts(Random(5), sources), 16),
    }
    for name, rows in made.items():
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
