"""What every command shares: the app, its options, errors in one line, stores by their address, and what is printed."""

import ast
import inspect
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

import moeflow
from moeflow import report
from moeflow.engines import ENGINES
from moeflow.report.promotion import NotPassed
from moeflow.run import CannotRun, ClusterLost, StepFailed, pipeline
from moeflow.run.go import Runner
from moeflow.run.opening import STORE, open_store, pipeline_file, reading, seconds, shipped  # noqa: F401  for the commands
from moeflow.run.outcome import describe, printable
from moeflow.store import NotStored, StoreError
from moeflow.store.errors import GaveUp
from moeflow.store.patience import may_pass

REQUEST = (ValueError, TypeError, LookupError, OSError, ImportError, StoreError)  # what a wrong request raises
WORK = (CannotRun, ClusterLost, StepFailed, StoreError, NotStored, NotPassed, OSError)

LONGEST = 2_000  # characters of an error's line


class OneLine(TyperGroup):
    """The commands; a word that fits none of them is told in one line, like every other error."""

    def main(self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **options: Any) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else [*args]
        _as_json.set("--json" in words)
        try:
            code = super().main(words or ["--help"], standalone_mode=False, **options)
        except TyperException as error:
            context = getattr(error, "ctx", None)
            said = error.format_message().rstrip(".")
            _complain(f"{said}; {_hint(said, context)}see {context.command_path if context else 'moeflow'} --help", 2)
            raise SystemExit(2) from None
        except typer.Abort:
            raise SystemExit(1) from None
        if standalone_mode:
            raise SystemExit(code if isinstance(code, int) else 0)
        return code


def _hint(said: str, context: Any) -> str:
    """How a word that stands alone is given as a parameter of a pipeline, if that is what is wrong."""
    extra = re.search(r"unexpected extra argument\S* \((\S+)", said)
    if extra is None or context is None or not any(p.name == "param" for p in context.command.params):
        return ""
    word = extra[1].rstrip(")")
    if "=" in word or "file" in context.params:  # a pipeline takes its model as a parameter
        return f"a parameter is given as -p {word if '=' in word else f'model={word}'}; "
    return ""


app = typer.Typer(
    cls=OneLine,
    pretty_exceptions_enable=False,
    help="Compress mixture-of-experts models. Exit codes: 0, 1 (the work failed), 2 (the request was wrong).",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"moeflow {moeflow.__version__}")
        raise typer.Exit


@app.callback()
def _of_every(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version and end")] = False,
) -> None:
    """What stands before a command; `_version` has acted on it."""


def _pipelines(incomplete: str) -> list[str]:
    """The names of pipelines that begin so, for a shell that completes them."""
    return [name for name in shipped() if name.startswith(incomplete)]


File = Annotated[
    Path,
    typer.Argument(
        autocompletion=_pipelines,
        metavar="PIPELINE",
        help="one that comes with moeflow, such as mixtral, a file that defines build(), or the recipe.yaml of a version",
    ),
]
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
Patience = Annotated[
    str, typer.Option("--patience", metavar="TIME", help="wait for a store or source that does not answer: 15m, 2h, 0s")
]
On = Annotated[
    Path | None,
    typer.Option("--on", metavar="CLUSTER.yaml", help="check against, and simulate on, the nodes of a file for `ray up`"),
]
GpuKind = Annotated[
    str, typer.Option("--gpu-kind", metavar="KIND", help="plan for --gpus N GPUs of this kind in all, h100 for example, one a step")
]
GateWords = Annotated[
    list[str], typer.Option("--gate", metavar="BOUND", help="kl<0.02, bytes<=24GB, gsm8k>=0.95x, or a gate.yaml; repeatable")
]
Track = Annotated[
    list[str],
    typer.Option("--track", metavar="WHERE", help="tensorboard:DIR, mlflow:URI or wandb:PROJECT also gets the numbers; repeatable"),
]
Engine = Annotated[
    str, typer.Option("--engine", metavar="ENGINE", help=f"what is to load the result: {', '.join(ENGINES)}; docs/engines.md")
]
Tp = Annotated[int, typer.Option("--tp", min=1, help="its tensor-parallel size: so many devices share each expert")]
Ep = Annotated[int, typer.Option("--ep", min=1, help="its expert-parallel size: experts are spread over so many devices")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
All = Annotated[bool, typer.Option("--all", help="a line for every step")]
Ref = Annotated[str, typer.Argument(metavar="REF", help="name@3, name, a label, a key, or the beginning of one key")]


_debug = ContextVar("debug", default=False)
_as_json = ContextVar("as_json", default=False)
own: ContextVar[pipeline.Build | None] = ContextVar("own", default=None)  # the `build` of the pipeline file that is running


class PipelineCommand(TyperCommand):
    """A command whose `--help` shows the pipeline's page if a pipeline file is named."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        word = next((word for word in args if word.endswith(".py") or word in shipped()), None) if "--help" in args else None
        if word is not None:
            _debug.set("--debug" in args)
            with asking():
                file = pipeline_file(word)
                build = own.get() or pipeline.load(file)
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


def print_reports(reports: Sequence[report.Report], extra: Mapping[str, report.Extra] | None = None) -> None:
    """Print the reports as one table, with their notes; `extra`: more columns, by their titles."""
    out = report.console()
    if any(r.rows for r in reports):
        print()
        out.print(report.table(reports, plain=not out.is_terminal, extra=extra or {}))
    for note in dict.fromkeys(note for r in reports for note in r.notes):
        print(f"- {printable(note)}")
    print()


def as_json() -> bool:
    """Whether the command's output is to be read by a machine."""
    return _as_json.get()


def print_json(value: Any) -> None:
    print(json.dumps(value), flush=True)


def asking(passing: int = 1) -> AbstractContextManager[None]:
    """Errors inside are the request's fault: exit code 2, or `passing` for one that may pass by itself."""
    return _one_line(REQUEST, 2, passing)


def working(passing: int = 1) -> AbstractContextManager[None]:
    """Errors inside are the work's fault: exit code 1, or `passing` for one that may pass by itself."""
    return _one_line(WORK, 1, passing)


@contextmanager
def _one_line(expected: tuple[type[Exception], ...], code: int, passing: int) -> Iterator[None]:
    """Turn expected errors, Ctrl-C and `ray job stop` into one line; any other error is a bug of moeflow."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        _complain("interrupted; what had finished is stored, and the next run continues there", 1)
        raise typer.Exit(1) from None
    except expected as error:
        plainly = isinstance(error, (*WORK, ValueError)) and str(error)
        waited = isinstance(error, GaveUp | ClusterLost) or may_pass(error)  # the request was right
        code = 2 if isinstance(error, CannotRun) else passing if waited else code
        _complain(str(error) if plainly else describe(error), code)
        if isinstance(error, ClusterLost):
            os._exit(code)  # at an orderly end Ray would wait for its head, and then end this process in its own words
        raise typer.Exit(code) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _complain(line: str, code: int) -> None:
    """Say what was wrong in one line; with --json also as the last line of the output."""
    if _debug.get():
        traceback.print_exc()
    line = " ".join(printable(" ".join(line.split())).split())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST - 500]} [...] {line[-400:]}"
    if _as_json.get():
        print_json({"error": line, "exit": code})
    print(f"error: {line}", file=sys.stderr, flush=True)
