"""The command line: parses words, calls what does the work, and prints. Knows no models and decides nothing.

A pipeline file ends with `main(build)`, so `python PIPELINE.py ...` is `moeflow run PIPELINE.py ...`.
"""

import ast
import inspect
import json as json_
import re
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from moeflow import report
from moeflow.report import lineage as lineages
from moeflow.run import CannotRun, ClusterLost, Options, StepFailed, pipeline
from moeflow.run import plan as plans
from moeflow.run.go import Runner, go, prepare
from moeflow.run.outcome import describe
from moeflow.run.plan_table import plan_lines, plan_table
from moeflow.run.progress import show as show_progress
from moeflow.run.words import count, size
from moeflow.store import LocalBlobs, NotStored, Store, StoreError, versions
from moeflow.store import gc as garbage_
from moeflow.store import repair as repair_

STORE = ".moeflow/store"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
REQUEST = (ValueError, TypeError, LookupError, OSError, ImportError, StoreError)  # what a wrong request raises
WORK = (CannotRun, ClusterLost, StepFailed, StoreError, NotStored, OSError)

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Compress mixture-of-experts models. Exit codes: 0, 1 (the work failed), 2 (the request was wrong).",
)

File = Annotated[Path, typer.Argument(metavar="PIPELINE.py", help="a file that defines build()")]
Params = Annotated[
    list[str], typer.Option("-p", "--param", metavar="NAME=VALUE", help="a parameter; `PIPELINE.py --help` lists them")
]
Url = Annotated[str, typer.Option("--store", metavar="URL", help="a folder, or s3://bucket/prefix")]
Name = Annotated[str, typer.Option("--name", help="publish under this name (the pipeline's file name)")]
RunnerName = Annotated[Runner, typer.Option("--runner", help="auto is ray if RAY_ADDRESS is set, else process")]
InFlight = Annotated[int, typer.Option("--in-flight", min=0, help="most steps at once on Ray; 0: what its CPUs allow")]
Retries = Annotated[int, typer.Option("--retries", min=0, help="how often a step is retried when its worker is lost")]
Gpus = Annotated[
    float | None, typer.Option("--gpus", min=0, help="GPUs of each step that computes with a model (1 if there are any)")
]
Cpus = Annotated[float | None, typer.Option("--cpus", min=1, help="CPUs, and threads, of each such step (1)")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
All = Annotated[bool, typer.Option("--all", help="a line for every step")]
Ref = Annotated[str, typer.Argument(metavar="REF", help="name@3, name, a label, a key, or the beginning of one key")]


_debug = ContextVar("debug", default=False)
_own: ContextVar[pipeline.Build | None] = ContextVar("own", default=None)  # the `build` of the pipeline file that is running


class PipelineCommand(TyperCommand):
    """A command whose `--help` shows the pipeline's page if a pipeline file is named."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        file = next((Path(word) for word in args if word.endswith(".py")), None)
        if "--help" in args and file is not None:
            _debug.set("--debug" in args)
            with asking():
                build = _own.get() or pipeline.load(file)
            print(pipeline.page(build, ast.get_docstring(ast.parse(file.read_text())) or ""))
            print(f"\nThe options --store, --runner and so on are those of: moeflow {self.name} --help")
            ctx.exit()
        return super().parse_args(ctx, args)


def command(**options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command of `moeflow`; every command takes `--debug` too."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def with_debug(*, debug: bool, **arguments: Any) -> None:
            _debug.set(debug)
            function(**arguments)

        signature = inspect.signature(function)
        debug = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
        with_debug.__signature__ = signature.replace(parameters=[*signature.parameters.values(), debug])  # type: ignore[attr-defined]
        app.command(**options)(with_debug)
        return function

    return add


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
        opened = _open(store)
        target = pipeline.call(_own.get() or pipeline.load(file), param)
        planned = plans.plan([target, *target.reports], opened, memory=runner.memory)
    if json:
        _json({"key": target.key, **planned.json()})
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
        opened = _open(store)
        target = options.place(pipeline.call(_own.get() or pipeline.load(file), param))
        prepared = prepare(target, opened, name=name, runner=runner)
    shown = show_progress(json=json)
    lost = not store and "working_dir_files" in Path.cwd().parts  # of a Ray job, which is deleted with the cluster
    if lost:
        shown.say(f"warning: the store {opened.url} goes with the Ray cluster; pass --store to keep what this run makes")
    with working():
        outcome, n = go(prepared, progress=shown, options=options, record={"pipeline": name, "given": param})
        reports = report.read(opened, [s.key for s in target.reports])
    if json:
        steps = {"run": len(outcome.ran), "stored": outcome.reused}
        _json({"key": target.key, "name": name, "version": n, "steps": steps, "seconds": round(outcome.seconds, 3)})
        return
    _reports(reports)
    where = f" --store {shlex.quote(opened.url)}" if store or lost else ""
    print(f"{name}@{n}  {target.key}\nin {opened.url}; to use it: moeflow pull {name}@{n} DIR{where}")


@command()
def ls(
    name: Annotated[str, typer.Argument(help="only versions of this name")] = "",
    store: Url = "",
    json: Json = False,
) -> None:
    """List the versions, newest last, with their labels."""
    with asking():
        listed = sorted(versions.list(_reading(store), name), key=lambda v: v.created)
    if json:
        _json([_version(v) for v in listed])
        return
    for v in listed:
        print(f"{v.ref:<24} {v.created}  {v.key}  {' '.join(v.labels)}".rstrip())
    if not listed:
        print(f"no versions{f' of {name}' if name else ''} in {store or STORE}", file=sys.stderr)


@command()
def show(ref: Ref, store: Url = "", all: All = False, json: Json = False) -> None:
    """Show a version: parameters, everything upstream, library versions, source digests and reports."""
    with asking():
        opened = _reading(store)
        version, key = _resolve(opened, ref)
        upstream = versions.lineage(opened, key)
        reports = report.read(opened, version.reports if version else [])
    if json:
        about = {"version": _version(version) if version else None, "key": key}
        libraries = lineages.libraries(upstream)
        lineage = [json_.loads(m.dump()) for m in upstream.values()]
        _json(about | {"libraries": libraries, "lineage": lineage, "reports": [asdict(r) for r in reports]})
        return
    out = report.console()
    plain = not out.is_terminal
    for line in lineages.facts(upstream[key], version):
        print(line)
    print(f"\n{len(upstream):,} keys, with everything upstream:")
    out.print(lineages.steps(upstream, every=all, plain=plain))
    print("\nlibraries  " + ", ".join(f"{k} {' and '.join(v)}" for k, v in lineages.libraries(upstream).items()))
    _reports(reports)


@command()
def pull(
    ref: Ref,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a new or empty folder")],
    dense: Annotated[bool, typer.Option("--dense", help="multiply low-rank matrices out, for engines without a kernel")] = False,
    store: Url = "",
    json: Json = False,
) -> None:
    """Copy a version's files into a folder that transformers loads; the copies are yours to change."""
    with asking():
        opened = _reading(store)
        _, key = _resolve(opened, ref)
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise FileExistsError(f"{folder} is not empty; name a folder that does not exist yet")
        manifest = opened.manifest(key)
    with working():
        opened.fetch(key, folder)
        made = _multiplied_out(folder) if dense else {}
    if json:
        about = {"key": key, "folder": str(folder.absolute()), "files": len(manifest.files), "bytes": manifest.bytes}
        _json(about | ({"dense": made} if dense else {}))
        return
    print(f"{folder}: {count(len(manifest.files), 'file')}, {size(manifest.bytes)}, from {key}")
    if dense and made["matrices"]:
        print(
            f"{made['matrices']:,} low-rank matrices multiplied out: {size(made['before'])} of weights have become "
            f"{size(made['after'])}, and run no faster than what was never cut"
        )
    elif dense:
        print("no matrix is low-rank: there was nothing to multiply out")


@command()
def promote(
    ref: Ref,
    label: Annotated[str, typer.Argument(help="a word like production")],
    store: Url = "",
    json: Json = False,
) -> None:
    """Point a label at a version; afterwards REF may be the label."""
    with asking():
        version = versions.promote(_open(store), ref, label)
    if json:
        _json({"label": label, "ref": version.ref, "key": version.key})
    else:
        print(f"{label} is {version.ref}, {version.key}")


@command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="delete what is listed")] = False,
    grace: Annotated[str, typer.Option("--grace", help="spare what is younger: 7d, 12h, 30m, 0s")] = "7d",
    store: Url = "",
    json: Json = False,
) -> None:
    """List what no version reaches and is older than the grace period; with --delete, delete it."""
    with asking():
        opened = _reading(store)
        garbage = garbage_.gc(opened, _seconds(grace))
    with working():
        gone = garbage_.delete(opened, garbage) if delete else garbage
    if json:
        about = {"deleted": delete, "manifests": list(gone.manifests), "partials": list(gone.partials)}
        _json(about | {"blobs": len(gone.blobs), "bytes": gone.bytes, "broken": list(gone.broken)})
        return
    for key in gone.manifests:
        print(key)
    for key in gone.partials:
        print(f"{key} (interrupted)")
    what = f"{count(len(gone.manifests), 'artifact')} and {count(len(gone.blobs), 'blob')}, {size(gone.bytes)}"
    empty = not (gone.manifests or gone.blobs or gone.partials or gone.leftovers)
    print("nothing to delete" if empty else f"deleted {what}" if delete else f"{what}; delete with --delete")
    for key in gone.broken:
        print(f"warning: {key} cannot be read: a blob is gone or cut short; run its pipeline again", file=sys.stderr)


@command()
def verify(
    ref: Annotated[str, typer.Argument(metavar="[REF]", help="a version or key, with everything that it was made from")] = "",
    all: Annotated[bool, typer.Option("--all", help="everything that the store holds")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="drop what is damaged with everything that rests on it")] = False,
    store: Url = "",
    json: Json = False,
) -> None:
    """Compare every byte of a version, or of the store, with what was written. Exit code 1 if any is damaged and not dropped."""
    with asking():
        if bool(ref) == all:
            raise ValueError("name a version or key, or say --all")
        opened = _reading(store)
        version, key = _resolve(opened, ref) if ref else (None, "")
    with working():
        damage = repair_.inspect(opened, key, version.reports if version else ())
        if repair and damage.names:
            repair_.drop(opened, damage.names)
    refs = [v.ref for v in damage.versions]
    if json:
        about = {"files": damage.files, "bytes": damage.bytes, "damaged": dict(damage.names), "keys": list(damage.keys)}
        _json(about | {"versions": refs, "orphans": len(damage.orphans), "dropped": bool(repair and damage.names)})
    else:
        for line in [*damage.names.values(), *(f"{key} rests on what is damaged" for key in damage.keys)]:
            print(line)
        read = f"{count(damage.files, 'file')}, {size(damage.bytes)}"
        print(f"{read}: {count(len(damage.names), 'object')} damaged" if damage.names else f"{read}: all as they were written")
        if damage.orphans:
            unused = size(sum(e.size for e in damage.orphans))
            print(f"{count(len(damage.orphans), 'blob')}, {unused}, that nothing names; see `moeflow gc`")
        if damage.names:
            print("dropped: the next run computes them again" if repair else "to drop them, and compute them again: --repair")
        for v in damage.versions:
            print(f"{v.ref} rests on them: run its pipeline, {v.record.get('pipeline', v.name)}, again")
    if damage.names and not repair:
        raise typer.Exit(1)


def main(build: Callable[..., Any] | None = None) -> None:
    """The `moeflow` command; with a pipeline's `build`, `moeflow run` with the file that is running."""
    _own.set(build)
    app(None if build is None else ["run", *sys.argv])


def _reports(reports: Sequence[report.Report]) -> None:
    out = report.console()
    if any(r.rows for r in reports):
        print()
        out.print(report.table(reports, plain=not out.is_terminal))
    for note in dict.fromkeys(note for r in reports for note in r.notes):
        print(f"- {note}")
    print()


def _open(url: str) -> Store:
    """Open and check a store that will be written to. Raises StoreError."""
    store = Store.open(url or STORE)
    store.check()
    return store


def _reading(url: str) -> Store:
    """Open a store that must exist. Raises FileNotFoundError."""
    store = Store.open(url or STORE)
    if isinstance(store.blobs, LocalBlobs) and not store.blobs.root.is_dir():
        raise FileNotFoundError(f"there is no store {store.url}; pass --store, or run a pipeline")
    return store


def _resolve(store: Store, ref: str) -> tuple[versions.Version | None, str]:
    """The version and key that `ref` means; for a key, the newest version that published it, or None."""
    target = versions.resolve(store, ref)
    if isinstance(target, str):
        published = [v for v in versions.list(store) if v.key == target]
        return max(published, key=lambda v: v.created, default=None), target
    return target, target.key


def _version(v: versions.Version) -> dict[str, Any]:
    about = {"ref": v.ref, "name": v.name, "version": v.n, "key": v.key, "created": v.created}
    return about | {"labels": list(v.labels), "reports": list(v.reports), "record": dict(v.record)}


def _multiplied_out(folder: Path) -> dict[str, Any]:
    """Multiply the factors in a pulled folder, in a process of its own, because this one has not loaded torch."""
    words = [sys.executable, "-P", "-m", "moeflow.model.dense", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"the process that multiplies ended with {done.returncode}"]
        raise OSError(f"{said[-1]}; {folder} may be half done, remove it and pull again")
    return json_.loads(done.stdout)


def _seconds(text: str) -> float:
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)):
        raise ValueError(f"--grace {text}: write a number and s, m, h or d, as in 7d")
    return float(match[1]) * UNITS[match[2]]


def _json(value: Any) -> None:
    print(json_.dumps(value), flush=True)


def asking() -> AbstractContextManager[None]:
    """Errors inside are the request's fault: exit code 2."""
    return _one_line(REQUEST, 2)


def working() -> AbstractContextManager[None]:
    """Errors inside are the work's fault: exit code 1."""
    return _one_line(WORK, 1)


@contextmanager
def _one_line(expected: tuple[type[Exception], ...], code: int) -> Iterator[None]:
    """Turn expected errors, Ctrl-C and `ray job stop` into one line; any other error is a bug of moeflow."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        _complain("interrupted; what had finished is stored, and the next run continues there")
        raise typer.Exit(1) from None
    except expected as error:
        plainly = isinstance(error, (*WORK, ValueError)) and str(error)
        _complain(" ".join(str(error).split()) if plainly else describe(error))
        raise typer.Exit(2 if isinstance(error, CannotRun) else code) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _complain(line: str) -> None:
    if _debug.get():
        traceback.print_exc()
    print(f"error: {line}", file=sys.stderr, flush=True)
