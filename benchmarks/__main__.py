"""Run every benchmark and write RESULTS.md: `make bench`. Nothing else should run on the machine meanwhile."""

import datetime
import importlib
import platform
import sys
from pathlib import Path

from moeflow.methods.speed import here

ALL = ("search", "calibrate", "driver", "store")


def main(names: list[str]) -> int:
    rows = []
    for name in names or ALL:
        print(f"{name} ...", file=sys.stderr, flush=True)
        for row in importlib.import_module(f"benchmarks.{name}").main():
            print(row.line(), flush=True)
            rows.append(row)
    machine = here()
    told = f"{machine['processor']}, {machine['cores']} cores, GPUs: {', '.join(machine['gpus']) or 'none'}"
    lines = [
        "# Results",
        "",
        f"{datetime.date.today()}, {told}; Python {platform.python_version()}, torch {machine['torch']}. One run of `make bench`;",
        "each claim is a ratio beside what it beats, measured in the same run, or the time of a whole command.",
        "",
        "| claim | measured | target | held |",
        "|---|---|---|---|",
        *(row.line() for row in rows),
    ]
    if not names:
        (Path(__file__).parent / "RESULTS.md").write_text("\n".join(lines) + "\n")
    return 0 if all(row.held for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
