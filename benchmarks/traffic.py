"""What a run reads and writes: planned for Mixtral-8x7B at its real size, and counted on a small model beside its plan."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.driver import ROOT, command
from benchmarks.real_sizes import SMALL, mixtral_8x7b
from benchmarks.rows import Row
from moeflow.run.words import size

GB = 1e9
TEXTS = ("-p", "tokens=python:stdlib/a*.py", "-p", "heldout=python:stdlib/t*.py")
BEFORE = ("-p", "source=copy", "-p", "calibration.shard=32")  # what `pipelines/mixtral.py` did at first
SHORT = ("calibration.sequences=32", "calibration.length=64", "calibration.shard=16", "heldout.sequences=8", "heldout.length=64")


def planned(*words: str) -> dict[str, Any]:
    """What `moeflow plan` says; that the result has no room on this disk, exit code 2, is beside the point."""
    program = "from moeflow.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", "pipelines/mixtral.py", *words, "--json"], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode not in (0, 2) or not done.stdout.startswith('{"key"'):
        raise RuntimeError(done.stderr)
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def large(folder: Path) -> tuple[list[Row], str]:
    """Mixtral-8x7B on the nodes of `ray_cluster.yaml`, which do not hold both whole models, so that no speed is measured."""
    model = mixtral_8x7b(folder / "mixtral")
    for path in model.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)  # the digests of what has just been written are not remembered
    words = (*TEXTS, "-p", f"model={model}", "--store", str(folder / "none"))
    here, anywhere = ("--on", "ray_cluster.yaml"), ("--runner", "ray")
    before, after, whole, copied = (planned(*words, *more) for more in ((*BEFORE, *anywhere), here, anywhere, (*BEFORE, *here)))
    rows = [
        Row("Mixtral-8x7B, bytes that a run of mixtral.py reads, by its plan", after["reads"] / GB, "at most", 600, "GB"),
        Row("Mixtral-8x7B, bytes that it writes, by its plan", after["writes"] / GB, "at most", 170, "GB"),
    ]
    gigabytes = [f"{p['reads'] / GB:,.0f} GB read and {p['writes'] / GB:,.0f} written" for p in (before, whole, copied, after)]
    text = (
        f"By plans: {gigabytes[0]} with weights copied and four shards, {gigabytes[1]} now. Where no node holds both "
        f"whole models, so that speed is left out: {gigabytes[2]} then, {gigabytes[3]} now, by step:\n\n"
    )
    return rows, text + by_step(after["rows"])


def by_step(rows: list[dict[str, Any]]) -> str:
    names = dict.fromkeys(r["name"] for r in rows)
    lines = ["| step | reads | writes |", "|---|---|---|"]
    for name in names:
        reads, writes = (sum(r[what] for r in rows if r["name"] == name) for what in ("reads", "writes"))
        if reads + writes > GB:
            lines.append(f"| {name} | {size(reads)} | {size(writes)} |")
    return "\n".join(lines)


def small(folder: Path) -> list[Row]:
    """The plan of a run of the small model, and what the run counted, read and written by all its steps."""
    from moeflow.store import Store

    words = (*TEXTS, "-p", f"model={SMALL}", *(w for s in SHORT for w in ("-p", s)), "--store", str(folder / "store"))
    plan = planned(*words)
    command("run", "pipelines/mixtral.py", *words, "--json")
    store = Store.open(str(folder / "store"))
    made = store.manifests(row["key"] for row in plan["rows"]).values()
    reads, writes = sum(m.reads for m in made), sum(e.size for e in store.blobs.list("blobs/"))
    return [
        Row(
            f"the small Mixtral, bytes that a run {what} beside its plan",
            max(counted, plan[said]) / min(counted, plan[said]),
            "at most",
            1.1,
            "times",
        )
        for what, counted, said in (("reads", reads, "reads"), ("writes", writes, "writes"))
    ]


def main() -> tuple[list[Row], str]:
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["MOEFLOW_CACHE"] = f"{scratch}/cache"
        rows, table = large(Path(scratch))
        return [*rows, *small(Path(scratch))], table


if __name__ == "__main__":
    done, text = main()
    print("\n".join([*(row.line() for row in done), "", text]))
