"""The command that makes a model fit into a budget: the packaged pipeline, with the budget as options."""

from pathlib import Path
from typing import Annotated

import typer

from moeflow import report
from moeflow.cli import runs
from moeflow.cli.common import (
    Cpus,
    Engine,
    Ep,
    GateWords,
    GpuKind,
    Gpus,
    Json,
    Name,
    On,
    Params,
    Patience,
    RunnerName,
    Tp,
    Track,
    Url,
    asking,
    command,
    open_store,
    own,
    print_json,
    print_reports,
    seconds,
    working,
)
from moeflow.run import fitting, in_process, pipeline
from moeflow.run import plan as plans
from moeflow.run.go import Runner
from moeflow.run.opening import pipeline_file

MEASURES = ("calibrate.forks", "calibrate.curves")
"""The steps that measure alternatives, and put together what they cost."""

Model = Annotated[str, typer.Argument(metavar="MODEL", help="a folder, org/name[@revision] on the hub, or s3://bucket/prefix")]
Bytes = Annotated[str, typer.Option("--bytes", metavar="SIZE", help="all weights on disk take at most this: 24GB, 22.5GiB")]
Ratio = Annotated[float | None, typer.Option("--ratio", help="this part of the bytes of all weights goes: 0.25")]
Resident = Annotated[str, typer.Option("--resident", metavar="SIZE", help="all weights in the engine's memory take at most this")]
Speed = Annotated[str, typer.Option("--speed", metavar="TIMES", help="so many times fewer multiplications a token: 1.5x")]
Recover = Annotated[bool, typer.Option("--recover", help="then fine-tune it towards the original")]
Frontier = Annotated[bool, typer.Option("--frontier", help="show what each budget would cost, as a fit has measured")]
Planned = Annotated[bool, typer.Option("--plan", help="show what would be measured, and what it takes; run nothing")]


@command()
def fit(
    model: Model,
    bytes: Bytes = "",
    ratio: Ratio = None,
    resident: Resident = "",
    speed: Speed = "",
    engine: Engine = "",
    tp: Tp = 1,
    ep: Ep = 1,
    recover: Recover = False,
    frontier: Frontier = False,
    param: Params = [],  # noqa: B006
    planned: Planned = False,
    store: Url = "",
    name: Name = "",
    gate: GateWords = [],  # noqa: B006
    runner: RunnerName = Runner.auto,
    on: On = None,
    gpus: Gpus = None,
    gpu_kind: GpuKind = "",
    cpus: Cpus = None,
    patience: Patience = "15m",
    track: Track = [],  # noqa: B006
    json: Json = False,
) -> None:
    """Make a model fit into a budget, at the least change of what it predicts: --bytes, --ratio, --resident or --speed."""
    budget = fitting.budget_words(bytes=bytes, ratio=ratio, resident=resident, speed=speed)
    with asking():
        loads, sizes = fitting.engine_words(engine, tp, ep), {"engine": engine, "tp": tp, "ep": ep}
    words = [*fitting.fit_words(model, budget, engine=loads, recover=recover), *param]
    if frontier:
        with asking():
            if planned:
                raise ValueError("--frontier shows what a fit has measured, --plan what one would measure; take one of them")
        budgeted = any(word.startswith("budget.") for word in words)
        _frontier([*words, *["budget.ratio=1e-6"] * (not budgeted)], store, patience, json=json)
        return
    with asking():
        fitting.check_budget(words)
        if gate and planned:
            raise ValueError("--gate is asked of a result, and --plan makes none; leave one of them away")
        if (on or gpu_kind) and not planned:
            raise ValueError("--on and --gpu-kind say which nodes to plan for; add --plan, or leave them away")
        build = _pipeline()
    same = {"store": store, "runner": runner, "gpus": gpus, "cpus": cpus, "patience": patience, "json": json, **sizes}
    before = own.set(build)
    try:
        if planned:
            runs.plan(Path(fitting.PIPELINE), words, on=on, gpu_kind=gpu_kind, **same)
        else:
            runs.run(Path(fitting.PIPELINE), words, name=name, gate=gate, track=track, **same)
    finally:
        own.reset(before)  # another command in this process runs its own pipeline


def _pipeline() -> pipeline.Build:
    return pipeline.load(pipeline_file(fitting.PIPELINE))


def _frontier(words: list[str], url: str, patience: str, *, json: bool) -> None:
    """Show the frontier of this model and these options, if the store has what a fit of them has measured."""
    with asking():
        opened = open_store(url, seconds("--patience", patience))
        target = pipeline.call(_pipeline(), [*words, "frontier=true"])
        lacking = [row for row in plans.plan([target], opened).rows if row.state == "run" and row.name in MEASURES]
        if lacking:
            raise ValueError(
                f"{opened.url} has no curves of this model with these options; run moeflow fit without --frontier first"
            )
    with working():
        in_process.run([target], opened)
        reports = report.read(opened, [target.key])
    if json:
        print_json({"rows": reports[0].rows})
    else:
        print_reports(reports)
