"""moeflow from Python: what the command line does, with values in the place of words, and the same checks.

import moeflow

small = moeflow.run("mixtral", model="FOLDER", tokens="TEXT.jsonl", heldout="OTHER.jsonl", keep=6)
small = moeflow.fit("FOLDER", bytes="24GB", tokens="TEXT.jsonl", heldout="OTHER.jsonl")
small.report, small.load(), small.pull("DIR"), small.compare("mixtral@1")
"""

import sys
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TextIO

from moeflow.result import Version, found
from moeflow.run import Options, fitting, pipeline
from moeflow.run.go import Runner
from moeflow.run.job import Job
from moeflow.run.opening import pipeline_file, reading, shipped
from moeflow.run.progress import Show
from moeflow.run.progress import show as shown
from moeflow.run.words_of import words_of
from moeflow.store import NotStored
from moeflow.store import versions as stored


def run(
    pipeline: str | PathLike[str],
    /,
    *,
    store: str = "",
    name: str = "",
    runner: str = "auto",
    gpus: float | None = None,
    cpus: float | None = None,
    patience: str = "15m",
    progress: bool = True,
    **parameters: Any,
) -> Version:
    """Run what is not stored yet, publish the result, and return it as a version.

    `pipeline`: one that comes with moeflow, such as "mixtral" (`moeflow.pipelines()`), or a file that defines `build`.
    `parameters`: the pipeline's own; options are set by a value of their type, by a mapping of fields, `search={"seed": 1}`, or by
    their first field, `search="reap"`. `store`: a folder or s3://bucket/prefix, `.moeflow/store` by default. `name`: what the
    result is published as, the pipeline's name by default. `runner`: "auto", "process" or "ray". `gpus`, `cpus`: of each step that
    computes with a model. `patience`: how long a store or source that does not answer is waited for. `progress`: show it.

    Raises ValueError, TypeError, LookupError or OSError, in one line, for what is wrong with the request, before anything runs;
    StepFailed if a step fails: what had finished is stored, and the next run continues there.
    """
    build = _built(pipeline)
    return _run(
        Job(
            fspath(pipeline), words_of(build, parameters), store, name, _runner(runner),
            Options(gpus=gpus, cpus=cpus), patience, build,
        ),
        progress,
    )  # fmt: skip


def fit(
    model: str | PathLike[str],
    /,
    *,
    bytes: str | int = "",
    ratio: float | None = None,
    resident: str | int = "",
    speed: str | float = "",
    engine: str = "",
    recover: bool = False,
    **parameters: Any,
) -> Version:
    """Make a model fit into one budget, at the least change of what it predicts, and return the result as a version.

    `model`: a folder, org/name[@revision] on the hub, or s3://bucket/prefix. The budget: `bytes` on disk at most ("24GB", or a
    number of bytes), `ratio`, the part of them that goes, `resident` bytes in the engine's memory, or `speed`, so many times fewer
    multiplications a token. `engine`: what is to load the result, "moeflow" or "transformers". `recover`: fine-tune it towards the
    original before it is quantized. `parameters`: further ones of the pipeline "fit" (tokens, heldout, offers, calibration), and
    those of `run`: store, name, runner, gpus, cpus, patience, progress. Raises as `run` does.
    """
    budget = fitting.budget_words(bytes=str(bytes), ratio=ratio, resident=str(resident), speed=str(speed))
    how = {n: parameters.pop(n) for n in ("store", "name", "patience") if n in parameters}
    runner, progress = _runner(parameters.pop("runner", "auto")), parameters.pop("progress", True)
    options = Options(gpus=parameters.pop("gpus", None), cpus=parameters.pop("cpus", None))
    build = _built(fitting.PIPELINE)
    words = [*fitting.fit_words(fspath(model), budget, engine=engine, recover=recover), *words_of(build, parameters)]
    fitting.check_budget(words)
    return _run(Job(fitting.PIPELINE, words, runner=runner, options=options, build=build, **how), progress)


def load(where: str | PathLike[str], *, store: str = "", **options: Any) -> Any:
    """The model in a folder, or of a version in a store, whatever form it has, ready to use.

    `options` are those of transformers' `from_pretrained`, such as `dtype` and `device_map`. Raises NotStored where there is no
    such folder and no such version.
    """
    from moeflow.model import loading

    if Path(where).is_dir():
        return loading.model_in(Path(where), **options)
    try:
        at = version(fspath(where), store=store)
    except (NotStored, FileNotFoundError) as error:
        raise NotStored(f"{fspath(where)} is no folder here, and {error.args[0]}") from error
    return at.load(**options)


def version(ref: str, *, store: str = "") -> Version:
    """A version that a store holds: `name@3`, `name` for its newest, a label, or a key. Raises NotStored, FileNotFoundError."""
    return found(reading(store), ref)


def versions(name: str = "", *, store: str = "") -> list[Version]:
    """All versions that a store holds, or those of one name, newest last. Raises FileNotFoundError."""
    opened = reading(store)
    return [Version(opened, one) for one in sorted(stored.list(opened, name), key=lambda one: one.created)]


def pipelines() -> list[str]:
    """The names of the pipelines that come with moeflow."""
    return [*shipped()]


def _built(name: str | PathLike[str]) -> pipeline.Build:
    return pipeline.load(pipeline_file(name))


def _runner(word: str) -> Runner:
    if word not in (known := [one.value for one in Runner]):
        raise ValueError(f"runner={word!r}: choose one of {', '.join(known)}")
    return Runner(word)


def _run(job: Job, progress: bool) -> Version:
    show = shown(stream=_stream()) if progress else Show()
    prepared = job.prepared(show)
    _, n = job.go(prepared, show)
    return found(prepared.store, f"{prepared.name}@{n}")


def _stream() -> TextIO:
    """Where progress goes: a notebook shows what comes by stderr as an error."""
    return sys.stdout if "ipykernel" in sys.modules else sys.stderr
