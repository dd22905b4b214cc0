"""Make the small tasks beside this file, which the model in models/mixtral-small can do, from the standard library's sources.

    python -m tests.tasks.make

Only files that it was not trained on (s to z) are taken. Another Python has other sources and gives other tasks, so what counts is
what lies here. `next_line` is a task of lm-evaluation-harness; the others are files of rows (docs/evaluate.md).
"""

import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
BEFORE = 6
"""Lines of code in front of what is asked."""
NUMBER = re.compile(r"(?<=[\[(=,:] )\d\b|(?<=[\[(:-])\d\b")
WORDS = ("True", "False", "None", "self", "isinstance", "range", "return", "raise", "import")


def files() -> list[list[str]]:
    """The lines of every file, those of its licence and its documentation among them."""
    return [path.read_text().splitlines() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[s-z]*.py"))]


def places(random: Random, sources: list[list[str]]) -> Iterator[tuple[list[str], str]]:
    """Lines of code in front of a line, and that line, at random; no line is asked twice."""
    asked = set()
    while True:
        lines = random.choice(sources)
        at = random.randrange(BEFORE, max(BEFORE + 1, len(lines)))
        if at < len(lines) and (line := lines[at]).strip() and line not in asked and len("\n".join(lines[at - BEFORE : at])) < 300:
            asked.add(line)
            yield lines[at - BEFORE : at], line


def next_lines(random: Random, sources: list[list[str]], count: int) -> Iterator[dict[str, Any]]:
    """Code, and four lines of which one continues it; the others stand elsewhere and are about as long."""
    every = [line for lines in sources for line in lines if line.strip()]
    for before, line in places(random, sources):
        if not 12 <= len(line.strip()) <= 60:
            continue
        others = [o for o in random.sample(every, 400) if o.strip() != line.strip() and abs(len(o) - len(line)) < 4][:3]
        choices = [line, *others]
        random.shuffle(choices)
        yield {"code": "\n".join(before), "lines": choices, "right": choices.index(line)}
        if not (count := count - 1):
            return


def numbers(random: Random, sources: list[list[str]], count: int) -> Iterator[dict[str, Any]]:
    """Code that breaks off in front of a number of one digit, and that number."""
    for before, line in places(random, sources):
        if match := NUMBER.search(line):
            start = "\n".join([*before, line[: match.start()].rstrip(" ")])
            yield {"prompt": start, "answer": match[0], "stop": ["\n", ",", ")", "]", ":"]}
            if not (count := count - 1):
                return


def main() -> None:
    random, sources = Random(0), files()
    made = {
        "next_line": next_lines(random, sources, 120),
        "numbers": numbers(random, sources, 40),
    }
    for name, rows in made.items():
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
