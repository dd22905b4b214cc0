"""The commands that take a pipeline file, or the recipe of a version: plan and run."""

import shlex

import typer

from moeflow import report
from moeflow.cli.common import (
    STORE,
    All,
    Cpus,
    Engine,
    Ep,
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
    Tp,
    Track,
    Url,
    asking,
    command,
    own,
    print_json,
    print_reports,
    seconds,
    working,
)
from moeflow.engines import engine_word
from moeflow.job import Job, asked, check_engine
from moeflow.run import Options, node_kinds
from moeflow.run import plan as plans
from moeflow.run.events import Events
from moeflow.run.forecast import forecast, forecast_json, told
from moeflow.run.go import Runner
from moeflow.run.outcome import printable
from moeflow.run.plan_table import plan_lines, plan_table
from moeflow.run.progress import show as show_progress
from moeflow.step import upstream
from moeflow.store import Store
from moeflow.store.patience import heard


@command(cls=PipelineCommand)
def plan(
    file: File,
    param: Params = [],  # noqa: B006
    store: Url = "",
    runner: RunnerName = Runner.auto,
    engine: Engine = "",
    tp: Tp = 1,
    ep: Ep = 1,
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
        request = asked(file, param, opened, own.get())
        made = request.target
        check_engine(made, engine_word(engine, tp, ep) or request.engine)
        target = Options(gpus=None if gpu_kind else gpus, cpus=cpus).place(made)
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
        lines += told(simulated, planned, where) if where else []
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
    track: Track = [],  # noqa: B006
    engine: Engine = "",
    tp: Tp = 1,
    ep: Ep = 1,
    json: Json = False,
) -> None:
    """Run what is not stored yet, publish the result as NAME@N, and show what its reports say."""
    shown, options = Events() if json else show_progress(), Options(retries, in_flight, gpus, cpus)
    with asking():
        loads = engine_word(engine, tp, ep)
        job = Job(file, param, store, name, gate, runner, options, patience, own.get(), track, loads)
        ready = job.ready(shown)
    with working():
        done = ready.go(shown)
    if json:
        name, _, n = done.ref.partition("@")
        steps = {"run": len(done.outcome.ran), "stored": done.outcome.reused}
        seconds = round(done.outcome.seconds, 3)
        print_json({"key": done.key, "name": name, "version": int(n), "steps": steps, "seconds": seconds})
        return
    print_reports(done.reports)
    if done.refused:
        print(f"its gate would refuse it: {printable(done.refused)}")
    where = f" --store {shlex.quote(done.store.url)}" if store or job.temporary else ""
    print(f"{done.ref}  {done.key}\nin {done.store.url}; to use it: moeflow pull {done.ref} DIR{where}")
