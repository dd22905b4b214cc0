"""How runs spread over GPUs: simulated for models of real size, and what such figures are worth, by plans beside runs made here.

    python -m benchmarks.scale [--simulated | --runs]

`--simulated`: only what is simulated for models of real size, which takes a quarter of an hour and needs no quiet machine.
`--runs`: only plans beside runs made here, and two workers beside one, on a machine that does nothing else.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import real_sizes
from benchmarks.driver import ROOT
from benchmarks.quality import SHARED
from benchmarks.rows import Row
from moeflow.arch import Family
from moeflow.run import node_kinds, pipeline
from moeflow.run import plan as plans
from moeflow.run.forecast import forecast
from moeflow.run.simulate import Simulation
from moeflow.run.words import span
from moeflow.step import Step, step_of, upstream
from moeflow.store import Store

KIND, COUNTS = "h100", (1, 2, 4, 8, 16, 32, 64)
MODELS = {"Mixtral-8x7B": real_sizes.MIXTRAL_8X7B, "Qwen3-30B-A3B": real_sizes.QWEN3_30B_A3B, "DeepSeek-V3": real_sizes.DEEPSEEK_V3}
TEXTS = ("tokens=python:stdlib/a*.py", "heldout=python:stdlib/t*.py")
LARGE = {
    "fit": ("moeflow/methods/recipes/fitted.py", ("budget.ratio=0.25",)),
    "MoE-I²": ("pipelines/mixtral_moei2.py", ("tune=none",)),
}
TARGETS = {16: 0.8, 64: 0.6}
SHORT = ("calibration.sequences=32", "calibration.length=64", "calibration.shard=16", "heldout.sequences=8", "heldout.length=64")
MORE = ("calibration.sequences=64", "calibration.seed=1")
GENETIC = ("search.population=20", "search.generations=5", "calibration.record=2048", "calibration.stage=4", "tune=none")
SMALL = {
    "mixtral": ("pipelines/mixtral.py", (*SHORT, "keep=6"), ("keep=5", *MORE)),
    "MoE-I²": ("pipelines/mixtral_moei2.py", (*SHORT, *GENETIC), ("counts.keep=0.5", *MORE)),
    "fit": (
        "moeflow/methods/recipes/fitted.py",
        (*SHORT, "budget.ratio=0.25", "offers.group=16", "offers.measured=1024"),
        MORE,
    ),
}
"""Pipelines, what makes them run on the small model, and how a second run of each differs from the first."""
APART = (
    "calibration.sequences=32", "calibration.length=64", "calibration.shard=8", "calibration.stage=1", "budget.ratio=0.25",
    "offers.measured=1024", "heldout.sequences=8", "heldout.length=64",
)  # fmt: skip
"""What makes fit of a model of six layers a graph in which two workers have something to do."""


def built(file: str, *words: str) -> list[Step]:
    target = pipeline.call(pipeline.load(ROOT / file), [*TEXTS, *words])
    return [target, *target.reports]


def simulations(targets: list[Step], store: Store) -> Iterator[tuple[int, Simulation]]:
    """A run on each of `COUNTS` GPUs; none where a step finds no room."""
    index = store.index({s.name for s in upstream(targets)})
    for count in COUNTS:
        nodes = node_kinds.of_gpus(KIND, count)
        if simulated := forecast(targets, store, plans.plan(targets, store, index=index, nodes=nodes), nodes, index):
            yield count, simulated


def large(folder: Path) -> tuple[list[Row], str]:
    """Strong scaling of every pipeline on every model, by simulation."""
    store, rows = Store.open(str(folder / "none")), []
    lines = [
        f"Simulated on {KIND.upper()}s, eight a node, from nothing stored; efficiency in brackets.",
        "",
        "| run | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in COUNTS) + " | longest chain |",
        "|---" * (len(COUNTS) + 2) + "|",
    ]
    for model, config in MODELS.items():
        name = f"large/{model.lower()}"
        real_sizes.in_hub_cache(config, folder / "hub", name)
        for title, (file, words) in LARGE.items():
            targets = built(file, f"model={name}", "source=copy", *words)
            if title == "fit":
                rows.append(Row(f"fit on {model}: the longest chain", passes(targets), "at most", 5.0, "passes over the model"))
            made = dict(simulations(targets, store))
            if not made:
                lines.append(f"| {title}, {model} | " + " | ".join([""] * len(COUNTS)) + " | a step finds no room |")
                continue
            first = min(made)
            share = {n: made[first].seconds * first / (s.seconds * n) for n, s in made.items()}
            cells = [f"{span(made[n].seconds)} ({share[n]:.0%})" if n in made else "" for n in COUNTS]
            chain = made[max(made)].chain
            parts = ", ".join(f"{part} {span(seconds)}" for part, seconds in chain.parts[:3])
            lines.append(f"| {title}, {model} | {' | '.join(cells)} | {span(chain.seconds)}: {parts} |")
            rows += [
                Row(f"{title} on {model}, simulated: efficiency on {n} GPUs", share[n], "at least", target, "of 1")
                for n, target in TARGETS.items()
                if n in share
            ]
    return rows, "\n".join(lines)


def passes(targets: list[Step]) -> float:
    """The longest chain of steps, in passes of hidden states through all layers; reading inputs counts as the weights it runs."""
    longest: dict[str, float] = {}
    for one in upstream(targets):
        longest[one.key] = _passed(one) + max((longest[step_of(i).key] for i in one.inputs), default=0.0)
    return max(longest.values())


def _passed(one: Step) -> float:
    if one.name in ("calibrate.observe", "calibrate.advance", "calibrate.forks"):
        layers = dict(one.slots).get("layers")  # none behind the last
        return layers / Family.of(one.inputs[0].spec.output.config).num_layers if isinstance(layers, int) else 0.0
    if one.name == "calibrate.inputs":
        layer = one.inputs[-1].spec.output
        family = Family.of(layer.config)
        run = replace(layer, tensors={n: t for n, t in layer.tensors.items() if not family.of_expert(n, layer.layer)})
        return float(run.active / layer.active / family.num_layers)
    return 0.0


def moeflow(*words: str) -> dict[str, Any]:
    program = "from moeflow.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program, *words, "--json"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


def beside(file: str, store: Path, words: tuple[str, ...]) -> dict[str, float]:
    """A run of the small model over its plan: bytes read and written, seconds, and seconds of processors."""
    values = dict(word.split("=", 1) for word in (f"model={real_sizes.SMALL}", *TEXTS, *words))  # the last of a name counts
    params = [w for name, value in values.items() for w in ("-p", f"{name}={value}")]
    planned = moeflow("plan", file, *params, "--store", str(store))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = moeflow("run", file, *params, "--store", str(store))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    opened, keys = Store.open(str(store)), [r["key"] for r in planned["rows"] if r["state"] == "run"]
    made = [m for m in opened.manifests(keys).values() if not m.same_as]
    linked = {i.key.partition("/")[0] for m in made for i in m.inputs}
    old = {f.sha256 for m in opened.manifests(linked - {*keys}).values() for f in m.files.values()}
    written = {f.sha256: f.size for m in made for f in m.files.values() if f.sha256 not in old}
    computed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "reads": sum(m.reads for m in made) / planned["reads"],
        "writes": sum(written.values()) / planned["writes"],
        "seconds": run["seconds"] / planned["simulated"]["seconds"],
        "processor seconds": computed / planned["simulated"]["seconds"],
    }


def small(folder: Path) -> list[Row]:
    """Plans of runs made here: the first of each pipeline, of which nothing is known, and a second, larger one.

    One run goes before them, so that libraries are read from memory, as a plan takes them to be.
    """
    file, words, _ = SMALL["mixtral"]
    beside(file, folder / "store before", words)
    rows = []
    for title, (file, words, other) in SMALL.items():
        store = folder / f"store {title}"
        for which, more in (("first", ()), ("second", other)):
            ratios = beside(file, store, (*words, *more))
            for what, most in {"reads": 1.1, "writes": 1.1, "seconds": 1.5, "processor seconds": 1.5}.items():
                told = f"the small Mixtral, {which} {title}: {what} beside the plan (it took {ratios[what]:.2f} of it)"
                rows.append(Row(told, max(ratios[what], 1 / ratios[what]), "at most", most, "times"))
    return rows


def workers(folder: Path) -> Row:
    """One worker of one thread against two, on a Ray of this machine: fit without its reports, on a model whose steps take longer
    than starting them."""
    import ray

    from moeflow.run.ray import runner

    file, model = SMALL["fit"][0], SHARED / "models" / "mixtral-21m"
    took = []
    for count in (1, 2):
        targets = built(file, f"model={model}", *APART)[:1]
        ray.init(address="local", num_cpus=count, include_dashboard=False, log_to_driver=False)
        try:
            took.append(runner.run(targets, Store.open(str(folder / f"of {count}"))).seconds)
        finally:
            ray.shutdown()
    return Row(
        "fit of the Mixtral of 21 M, two workers of a thread: their efficiency", took[0] / took[1] / 2, "at least", 0.9, "of 1"
    )


def main(*, simulated: bool = True, runs: bool = True) -> tuple[list[Row], str]:
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"MOEFLOW_CACHE": f"{scratch}/cache", "HF_HUB_CACHE": f"{scratch}/hub", "HF_ENDPOINT": "http://127.0.0.1:9"}
        rows, table = large(Path(scratch)) if simulated else ([], "")
        return [*rows, *small(Path(scratch)), workers(Path(scratch))] if runs else rows, table


if __name__ == "__main__":
    done, text = main(simulated="--runs" not in sys.argv, runs="--simulated" not in sys.argv)
    print("\n".join([*(row.line() for row in done), "", text]))
