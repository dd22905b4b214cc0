"""moeflow from Python: what the command line does, with values in the place of words, and the same checks.

small = moeflow.run("mixtral", model="FOLDER", tokens="TEXT.jsonl", heldout="OTHER.jsonl", keep=6)
small = moeflow.fit("FOLDER", bytes="24GB", tokens="TEXT.jsonl", heldout="OTHER.jsonl")
small.report, small.load(), small.pull("DIR"), small.compare("mixtral@1")
"""

import sys
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TextIO

from moeflow.engines import engine_word
from moeflow.job import Job
from moeflow.result import Version, found
from moeflow.run import Options, fitting, recipe
from moeflow.run.go import Runner
from moeflow.run.opening import reading, shipped
from moeflow.run.progress import Show
from moeflow.run.progress import show as shown
from moeflow.run.words_of import words_of
from moeflow.store import NotStored
from moeflow.store import versions as published

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, in notebooks: what it would draw is shown by us

HOW = ("store", "name", "gate", "runner", "gpus", "cpus", "progress", "patience", "retries", "in_flight", "track", "engine")
"""Which parameters of `run` and `fit` say where and how, and are none of a pipeline's."""


def run(
    pipeline: str | PathLike[str],
    /,
    *,
    store: str = "",
    name: str = "",
    gate: Sequence[str] = (),
    runner: str = "auto",
    gpus: float | None = None,
    cpus: float | None = None,
    progress: bool = True,
    **parameters: Any,
) -> Version:
    """Run what is not stored yet, publish the result, and return it as a version.

    `pipeline`: one that comes with moeflow, such as "mixtral" (`moeflow.pipelines()`), a file that defines `build`, or the
    recipe.yaml of a version. `parameters`: the pipeline's own; options are set by a value of their type, by a mapping of fields,
    `search={"seed": 1}`, or by their first field, `search="reap"`. `store`: a folder or s3://bucket/prefix, `.moeflow/store` by
    default. `name`: what the result is published as, the pipeline's name by default. `gate`: bounds on its figures, such as
    "kl<0.02", or a gate.yaml. `runner`: "auto", "process" or "ray". `gpus`, `cpus`: of each step that computes with a model.
    `progress`: show it. Also `track`, such as "tensorboard:DIR", `patience`, `retries` and `in_flight`, as of `moeflow run`, and
    `engine`, such as "vllm" or "vllm,tp=4": what that does not run is refused before anything runs.

    Raises ValueError, TypeError, LookupError or OSError, in one line, for what is wrong with the request, before anything runs;
    StepFailed if a step fails: what had finished is stored, and the next run continues there.
    """
    how = {"store": store, "name": name, "gate": gate, "runner": runner, "gpus": gpus, "cpus": cpus, "progress": progress}
    more = {name: parameters.pop(name) for name in HOW if name in parameters}
    return _run(fspath(pipeline), (), parameters, how | more)


def fit(
    model: str | PathLike[str],
    /,
    *,
    bytes: str | int = "",
    ratio: float | None = None,
    resident: str | int = "",
    speed: str | float = "",
    engine: str = "",
    tp: int = 1,
    ep: int = 1,
    recover: bool = False,
    **parameters: Any,
) -> Version:
    """Make a model fit into one budget, at the least change of what it predicts, and return the result as a version.

    `model`: a folder, org/name[@revision] on the hub, or s3://bucket/prefix. The budget: `bytes` on disk at most ("24GB", or a
    number of bytes), `ratio`, the part of them that goes, `resident` bytes in the engine's memory, or `speed`, so many times fewer
    multiplications a token. `engine`: what is to load the result, such as "moeflow", "vllm" or "transformers"; `tp`, `ep`: its
    tensor- and expert-parallel sizes. `recover`: fine-tune it towards the original. `parameters`: further ones of the
    pipeline "fit" (tokens, heldout, offers, calibration), and those of `run`: store, name, gate, runner, gpus, cpus, progress.
    Raises as `run` does.
    """
    budget = fitting.budget_words(bytes=str(bytes), ratio=ratio, resident=str(resident), speed=str(speed))
    how = {name: parameters.pop(name) for name in HOW if name in parameters}
    words = fitting.fit_words(fspath(model), budget, engine=fitting.engine_words(engine, tp, ep), recover=recover)
    return _run(fitting.PIPELINE, words, parameters, how | {"engine": engine_word(engine, tp, ep)})


def stored(where: str, store: str) -> Version:
    """The version that `moeflow.load` is to load, if there is no such folder. Raises NotStored."""
    try:
        return version(where, store=store)
    except (NotStored, FileNotFoundError) as error:
        raise NotStored(f"{where} is no folder here, and {error.args[0]}") from error


def version(ref: str, *, store: str = "") -> Version:
    """A version that a store holds: `name@3`, `name` for its newest, a label, or a key. Raises NotStored, FileNotFoundError."""
    return found(reading(store), ref)


def versions(name: str = "", *, store: str = "") -> list[Version]:
    """All versions that a store holds, or those of one name, newest last. Raises FileNotFoundError."""
    opened = reading(store)
    return [Version(opened, one) for one in sorted(published.list(opened, name), key=lambda one: one.created)]


def pipelines() -> list[str]:
    """The names of the pipelines that come with moeflow."""
    return [*shipped()]


def _run(file: str, words: Sequence[str], parameters: Mapping[str, Any], how: Mapping[str, Any]) -> Version:
    """Run a pipeline with these words and parameters; `how`: values by the names in HOW."""
    build = recipe.build_of(Path(file))
    given = [*words, *words_of(build, parameters)]
    if file == fitting.PIPELINE:
        fitting.check_budget(given)
    gate, track = (_words(how.get(name, ())) for name in ("gate", "track"))
    options = Options(**{n: how[n] for n in ("retries", "in_flight", "gpus", "cpus") if n in how})
    job = Job(
        file, given, how.get("store", ""), how.get("name", ""), gate,
        _runner(how.get("runner", "auto")), options, how.get("patience", "15m"), build, track, how.get("engine", ""),
    )  # fmt: skip
    show = shown(stream=_stream()) if how.get("progress", True) else Show()
    done = job.ready(show).go(show)
    return found(done.store, done.ref)


def _words(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _runner(word: str) -> Runner:
    if word not in (known := [one.value for one in Runner]):
        raise ValueError(f"runner={word!r}: choose one of {', '.join(known)}")
    return Runner(word)


def _stream() -> TextIO:
    """Where progress goes: a notebook shows what comes by stderr as an error."""
    return sys.stdout if "ipykernel" in sys.modules else sys.stderr
