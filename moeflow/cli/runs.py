"""The commands that take a pipeline file: plan and run."""

import shlex
from pathlib import Path

import typer

from moeflow import report
from moeflow.cli.common import (
    All,
    Cpus,
    File,
    Gpus,
    InFlight,
    Json,
    Name,
    Params,
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
    working,
)
from moeflow.run import Options, pipeline
from moeflow.run import plan as plans
from moeflow.run.go import Runner, go, prepare
from moeflow.run.plan_table import plan_lines, plan_table
from moeflow.run.progress import show as show_progress


@command(cls=PipelineCommand)
def plan(
    file: File,
    param: Params = [],  # noqa: B006
    store: Url = "",
    runner: RunnerName = Runner.auto,
    all: All = False,
    json: Json = False,
) -> None:
    """Show what is stored, what would run, what it would read and write, and what cannot work."""
    with asking():
        opened = open_store(store)
        target = pipeline.call(own.get() or pipeline.load(file), param)
        planned = plans.plan([target, *target.reports], opened, memory=runner.memory)
    if json:
        print_json({"key": target.key, **planned.json()})
    else:
        out = report.console()
        out.print(plan_table(planned, every=all, plain=not out.is_terminal))
        for line in plan_lines(planned):
            print(line)
    if planned.problems:
        raise typer.Exit(2)


@command(cls=PipelineCommand)
def run(
    file: File,
    param: Params = [],  # noqa: B006
    store: Url = "",
    name: Name = "",
    runner: RunnerName = Runner.auto,
    in_flight: InFlight = 0,
    retries: Retries = 3,
    gpus: Gpus = None,
    cpus: Cpus = None,
    json: Json = False,
) -> None:
    """Run what is not stored yet, publish the result as NAME@N, and show what its reports say."""
    options, name = Options(retries, in_flight, gpus, cpus), name or file.stem
    with asking():
        opened = open_store(store)
        target = options.place(pipeline.call(own.get() or pipeline.load(file), param))
        prepared = prepare(target, opened, name=name, runner=runner)
        if prepared.runner is Runner.process and prepared.plan.keys("run"):
            options.check_here()
    shown = show_progress(json=json)
    lost = not store and "working_dir_files" in Path.cwd().parts  # of a Ray job, which is deleted with the cluster
    if lost:
        shown.say(f"warning: the store {opened.url} goes with the Ray cluster; pass --store to keep what this run makes")
    with working():
        outcome, n = go(prepared, progress=shown, options=options, record={"pipeline": str(file), "given": param})
        reports = report.read(opened, [s.key for s in target.reports])
    if json:
        steps = {"run": len(outcome.ran), "stored": outcome.reused}
        print_json({"key": target.key, "name": name, "version": n, "steps": steps, "seconds": round(outcome.seconds, 3)})
        return
    print_reports(reports)
    where = f" --store {shlex.quote(opened.url)}" if store or lost else ""
    print(f"{name}@{n}  {target.key}\nin {opened.url}; to use it: moeflow pull {name}@{n} DIR{where}")
