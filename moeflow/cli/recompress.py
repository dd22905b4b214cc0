"""The command that a scheduler calls: compress the newest checkpoint of a fine-tune, judge it, and promote it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from moeflow import recompress as work
from moeflow.cli.common import (
    Cpus,
    Engine,
    Ep,
    File,
    GateWords,
    Gpus,
    InFlight,
    Json,
    Name,
    Params,
    Patience,
    Retries,
    RunnerName,
    Tp,
    Track,
    Url,
    as_json,
    asking,
    command,
    open_store,
    own,
    print_json,
    seconds,
    working,
)
from moeflow.engines import engine_word
from moeflow.job import Job
from moeflow.recompress import Exit, Later, NothingNew, Request, Result
from moeflow.report import notice as notices
from moeflow.run import Options, recipe
from moeflow.run.go import Runner
from moeflow.run.outcome import printable
from moeflow.run.progress import show as show_progress
from moeflow.store import Store, versions
from moeflow.store.patience import heard

Source = Annotated[
    str,
    typer.Option("--source", metavar="PREFIX", help="where fine-tunes are written: a folder, s3://bucket/prefix, org/name@branch"),
]
Promote = Annotated[str, typer.Option("--promote", metavar="LABEL", help="the label that the result gets if its gate lets it")]
Keep = Annotated[int | None, typer.Option("--keep", min=1, help="delete all but so many versions of this name, and labelled ones")]
Notify = Annotated[
    str, typer.Option("--notify", metavar="URL|CMD", help="post what happened to a webhook, or give it to a command")
]
Marker = Annotated[str, typer.Option("--marker", metavar="FILE", help="a checkpoint is complete when this file lies in it")]
Settle = Annotated[str, typer.Option("--settle", metavar="TIME", help="without a marker: how long a checkpoint must stand still")]

NothingNewCode = Annotated[
    int, typer.Option("--nothing-new", metavar="CODE", help="the exit code when nothing is new; 0 where only success counts")
]


@command()
def recompress(
    file: File,
    source: Source,
    promote: Promote,
    param: Params = [],  # noqa: B006
    gate: GateWords = [],  # noqa: B006
    keep: Keep = None,
    notify: Notify = "",
    marker: Marker = "",
    settle: Settle = "30s",
    nothing_new: NothingNewCode = Exit.NOTHING_NEW,
    name: Name = "",
    store: Url = "",
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
    """Compress the newest complete checkpoint below --source, judge it, and promote it.

    Exit codes: 0 promoted, 1 failed, 2 the request was wrong, 3 nothing new, 4 its gate refused it, 75 try again later.
    """
    shown, options = show_progress(json=json), Options(retries, in_flight, gpus, cpus)
    with asking(), heard(shown.waits):
        if not store and "working_dir_files" in Path.cwd().parts:  # of a Ray job, which is deleted with the cluster
            raise ValueError("in a Ray job the store would go with the cluster, and every call would begin anew; pass --store")
        name = name or (recipe.read(file).name if recipe.is_recipe(file) else "") or file.stem
        build = own.get() or recipe.build_of(file)
        loads = engine_word(engine, tp, ep)
        job = Job(file, (), store, name, gate, runner, options, patience, build, track, loads)
        bounds = tuple(b.word for b in job.bounds())
        if notify:
            notices.check_target(notify)
        wanted = Request(file, source, promote, name, tuple(param), bounds, marker, seconds("--settle", settle), loads)
        opened = open_store(store, seconds("--patience", patience))
        versions.check_label(opened, promote)
    with _told(opened, notify, source, nothing_new), heard(shown.waits):
        with asking(Exit.LATER):
            there = work.find(wanted, opened, say=shown.say)
        with work.alone(wanted, opened, there):
            with asking(Exit.LATER):
                ready = work.planned(wanted, job, opened, there)
            with working(Exit.LATER):
                result = work.run(wanted, opened, there, ready, shown)
    work.cleaned(wanted, opened, keep, result, shown.say)
    if not json:
        for line in work.lines(result):
            print(printable(line))
    _send(opened, notify, result)
    if json:
        print_json(result.json())
    if result.exit:
        raise typer.Exit(result.exit)


@contextmanager
def _told(store: Store, notify: str, source: str, nothing_new: int) -> Iterator[None]:
    """End with the exit code of what could not be done, in one line; what failed is also sent as a notice."""
    try:
        yield
    except (Later, NothingNew) as error:
        code, said = (Exit.LATER, "try again later: ") if isinstance(error, Later) else (Exit.NOTHING_NEW, "nothing new: ")
        print(printable(said + " ".join(str(error).split())), file=sys.stderr, flush=True)
        if as_json():
            print_json(Result(code, str(error), source).json())
        raise typer.Exit(nothing_new if code is Exit.NOTHING_NEW else code) from None
    except typer.Exit as error:
        if error.exit_code in (Exit.FAILED, Exit.WRONG):
            _send(store, notify, Result(Exit(error.exit_code), " ".join(str(error.__context__ or "").split()), source))
        raise


def _send(store: Store, notify: str, result: Result) -> None:
    """Send the result to --notify, if there is one; a notice that is not taken is said, and changes nothing else."""
    if notify and (why := notices.notify(store, notify, result.json())):
        print(f"warning: {printable(why)}", file=sys.stderr, flush=True)
