"""Run the benchmarks, all or those named, and write their sections of RESULTS.md: `make bench`.

Nothing else should run on the machine meanwhile. `peers`, which installs other libraries and takes hours, and `serving`, whose
environment has vLLM, run only when named.
"""

import datetime
import importlib
import platform
import sys
from pathlib import Path

from benchmarks.rows import Row
from moeflow.methods.evaluate.steps import here

ALL = (
    "search",
    "calibrate",
    "overlap",
    "driver",
    "store",
    "recompression",
    "traffic",
    "scale",
    "genetic",
    "warm_starts",
    "decompose",
    "lowrank",
    "compressed_experts",
    "slimming",
    "slimming_memory",
    "quality",
    "recovery",
    "unified",
    "dial",
)
RESULTS = Path(__file__).parent / "RESULTS.md"
HEAD = "# Results\n\nEach section is one run of one script: ratios beside what is beaten, or times of whole commands.\n"


def section(name: str, rows: list[Row], table: str = "") -> str:
    machine = here()
    where = f"{machine['processor']}, {machine['cores']} cores, GPUs: {', '.join(machine['gpus']) or 'none'}"
    versions = f"Python {platform.python_version()}, torch {machine['torch']}"
    lines = [
        f"## {name}",
        "",
        f"{datetime.date.today()}, {where}; {versions}",
        "",
        "| claim | measured | target | held |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *(row.line() for row in rows), *(["", table] if table else [])]) + "\n"


def page(sections: dict[str, str]) -> str:
    """The whole file: the benchmarks in their order, then what other commands measured, such as `make chaos`."""
    order = [*(n for n in ALL if n in sections), *(n for n in sections if n not in ALL)]
    return "\n".join([HEAD, *(sections[n] for n in order)])


def main(names: list[str]) -> int:
    old = RESULTS.read_text().split("\n## ")[1:] if RESULTS.exists() else []
    sections = {text.split("\n", 1)[0]: f"## {text.rstrip()}\n" for text in old}
    holds = True
    for name in names or ALL:
        print(f"{name} ...", file=sys.stderr, flush=True)
        result = importlib.import_module(f"benchmarks.{name}").main()
        rows, table = result if isinstance(result, tuple) else (result, "")
        sections[name] = section(name, rows, table)
        print(sections[name], flush=True)
        holds &= all(row.holds for row in rows)
        RESULTS.write_text(page(sections))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
