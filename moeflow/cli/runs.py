"""The commands that take a pipeline file: plan and run."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import typer

from moeflow import report
from moeflow.cli.common import (
    STORE,
    All,
    Cpus,
    File,
    GateWords,
    GpuKind,
    Gpus,
    InFlight,
    Json,
    Name,
    On,
    Params,
    Patience,
    PipelineCommand,
    Retries,
    RunnerName,
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
from moeflow.report.figures import read_figures
from moeflow.report.gate import check_measured, judge, read_gate, refusal
from moeflow.run import Options, node_kinds, pipeline
from moeflow.run import plan as plans
from moeflow.run.forecast import forecast, forecast_json, forecast_lines
from moeflow.run.go import Runner, go, prepare
from moeflow.run.outcome import printable
from moeflow.run.plan_table import plan_lines, plan_table
from moeflow.run.progress import show as show_progress
from moeflow.step import Step, upstream
from moeflow.store import Store
from moeflow.store.patience import heard, wait_out


@command(cls=PipelineCommand)
def plan(
    file: File,
    param: Params = [],  # noqa: B006
    store: Url = "",
    runner: RunnerName = Runner.auto,
    on: On = None,
    gpus: Gpus = None,
    gpu_kind: GpuKind = "",
    cpus: Cpus = None,
    patience: Patience = "15m",
    all: All = False,
    json: Json = False,
) -> None:
    """Show what is stored, what would run, what it would read, write, take and cost, and what cannot work. Writes nothing."""
    with asking(), heard(show_progress(json=True).waits):
        if on and gpu_kind:
            raise ValueError(f"--on {on} and --gpu-kind {gpu_kind} both say which nodes there are; give one of them")
        nodes = node_kinds.read(on) if on else node_kinds.of_gpus(gpu_kind, gpus) if gpu_kind else None
        opened = Store.open(store or STORE, patience=seconds("--patience", patience))
        opened.look()
        target = Options(gpus=None if gpu_kind else gpus, cpus=cpus).place(called(file, param, opened))
        targets, memory = [target, *target.reports], None if nodes else runner.memory
        index = opened.index({s.name for s in upstream(targets)})
        planned = plans.plan(targets, opened, index=index, memory=memory, nodes=nodes)
        where = node_kinds.here(memory) if memory else nodes
        simulated = forecast(targets, opened, planned, where, index) if where else None
    if json:
        print_json({"key": target.key, **planned.json(), "simulated": forecast_json(simulated) if simulated else None})
    else:
        out = report.console()
        out.print(plan_table(planned, every=all, plain=not out.is_terminal))
        lines = plan_lines(planned)
        lines += forecast_lines(simulated, where) if simulated and where else [where.unknown] if where and where.unknown else []
        for line in lines:
            print(printable(line))
    if planned.problems:
        raise typer.Exit(2)


@command(cls=PipelineCommand)
def run(
    file: File,
    param: Params = [],  # noqa: B006
    store: Url = "",
    name: Name = "",
    gate: GateWords = [],  # noqa: B006
    runner: RunnerName = Runner.auto,
    in_flight: InFlight = 0,
    retries: Retries = 3,
    gpus: Gpus = None,
    cpus: Cpus = None,
    patience: Patience = "15m",
    json: Json = False,
) -> None:
    """Run what is not stored yet, publish the result as NAME@N, and show what its reports say."""
    options, name = Options(retries, in_flight, gpus, cpus), name or file.stem
    shown = show_progress(json=json)
    with asking(), heard(shown.waits):
        bounds = read_gate(gate)
        opened = open_store(store, seconds("--patience", patience))
        target = options.place(called(file, param, opened))
        check_measured(bounds, target)
        prepared = prepare(target, opened, name=name, runner=runner, options=options)
    lost = not store and "working_dir_files" in Path.cwd().parts  # of a Ray job, which is deleted with the cluster
    if lost:
        shown.say(f"warning: the store {opened.url} goes with the Ray cluster; pass --store to keep what this run makes")
    with working(), heard(shown.waits):
        record = {"pipeline": str(file), "given": param} | ({"gate": [b.word for b in bounds]} if bounds else {})
        outcome, n = go(prepared, progress=shown, options=options, record=record)
        reports = report.read(opened, [s.key for s in target.reports])
    if json:
        steps = {"run": len(outcome.ran), "stored": outcome.reused}
        print_json({"key": target.key, "name": name, "version": n, "steps": steps, "seconds": round(outcome.seconds, 3)})
        return
    print_reports(reports)
    if bounds and (why := refusal(judge(bounds, read_figures(opened, [s.key for s in target.reports])))):
        print(f"its gate would refuse it: {printable(why)}")
    where = f" --store {shlex.quote(opened.url)}" if store or lost else ""
    print(f"{name}@{n}  {target.key}\nin {opened.url}; to use it: moeflow pull {name}@{n} DIR{where}")


def called(file: Path, params: Sequence[str], store: Store) -> Step:
    """The graph of a pipeline file with these parameters, when the sources that it names have answered."""
    build = own.get() or pipeline.load(file)
    return wait_out(lambda: pipeline.call(build, params), store.patience, "a source")
