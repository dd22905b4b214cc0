"""One run as somebody asks for it, on the command line or in Python: the same words, checks, record and gate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from moeflow import report
from moeflow.engines import Form
from moeflow.report import trackers
from moeflow.report.figures import read_figures
from moeflow.report.gate import Bound, check_measured, judge, read_gate, refusal
from moeflow.report.tracking import Tracked
from moeflow.run import pipeline, recipe
from moeflow.run.go import Prepared, Runner, go, prepare
from moeflow.run.opening import open_store, seconds
from moeflow.run.options import Options
from moeflow.run.outcome import Outcome
from moeflow.run.progress import Show
from moeflow.step import Step
from moeflow.store import Store
from moeflow.store.patience import heard, wait_out

OFFLINE = 20.0
"""Seconds that a run which has not begun waits at most for a network to what a parameter is by default: another may be given."""


@dataclass(frozen=True)
class Job:
    """A pipeline with the words of its parameters, and where and how it is to run.

    `file`: the name of a pipeline that comes with moeflow, a file, or the recipe.yaml of a version. `store`: a folder or an
    address, "" for the usual folder. `name`: what the result is published as, "" for the name of the pipeline. `gate`: bounds, or
    files with them. `patience`: how long a store or a source that does not answer is waited for, as in 15m. `build`: the
    pipeline's function, if it is loaded already. `track`: where its numbers are to be looked at, as in tensorboard:DIR. `engine`:
    what is to load the result, as in vllm or vllm,tp=4; "" for what its recipe says, or no one in particular.
    """

    file: str | PathLike[str]
    given: Sequence[str] = ()
    store: str = ""
    name: str = ""
    gate: Sequence[str] = ()
    runner: Runner = Runner.auto
    options: Options = field(default_factory=Options)
    patience: str = "15m"
    build: pipeline.Build | None = None
    track: Sequence[str] = ()
    engine: str = ""

    @property
    def temporary(self) -> bool:
        """Whether its store lies in the folder of a Ray job, which is deleted with the cluster."""
        return not self.store and "working_dir_files" in Path.cwd().parts

    def ready(self, show: Show) -> "Ready":
        """Everything checked that can be before a step starts. Raises what a wrong request raises."""
        with heard(show.waits):
            self.bounds()
            return self.ready_in(open_store(self.store, seconds("--patience", self.patience)))

    def ready_in(self, store: Store) -> "Ready":
        """The same in a store that is open. Raises as `ready`."""
        bounds, about = self.bounds(), asked(self.file, self.given, store, self.build)
        job = replace(self, engine=self.engine or about.engine)
        check_engine(about.target, job.engine)
        target = self.options.place(about.target)
        check_measured(bounds, target)
        name = self.name or about.name
        return Ready(job, about, bounds, prepare(target, store, name=name, runner=self.runner, options=self.options))

    def bounds(self) -> tuple[Bound, ...]:
        """The bounds of its gate, read. Raises ValueError, also for a tracker that cannot be."""
        for word in self.track:
            trackers.check(word)
        return tuple(read_gate(self.gate))


@dataclass(frozen=True)
class Ready:
    """A job that may start."""

    job: Job
    asked: recipe.Asked
    bounds: tuple[Bound, ...]
    prepared: Prepared

    def go(self, show: Show, more: Mapping[str, Any] = {}) -> "Done":
        """Run what is missing, publish the result and read its reports. Raises StepFailed.

        `more`: what the version keeps beside how it was asked for.
        """
        prepared, store, record = self.prepared, self.prepared.store, {**self.asked.record(), **more}
        about = {"pipeline": str(record["pipeline"]), **{n: str(word) for n, word in record["parameters"].items()}}
        record |= {"gate": [b.word for b in self.bounds]} if self.bounds else {}
        record |= {"engine": self.job.engine} if self.job.engine else {}
        with heard(show.waits), Tracked(self.job.track, prepared.name, show, about) as tracked:
            if self.job.temporary:
                show.say(f"warning: the store {store.url} goes with the Ray cluster; pass --store to keep what this run makes")
            outcome, n = go(prepared, progress=tracked, options=self.job.options, record=record)
            ref, keys = f"{prepared.name}@{n}", [s.key for s in prepared.target.reports]
            tracked.result(store, prepared.target, ref, outcome)
            refused = refusal(judge(self.bounds, read_figures(store, keys))) if self.bounds else ""
            return Done(store, prepared.target.key, ref, outcome, report.read(store, keys), refused)


@dataclass(frozen=True)
class Done:
    """What a job has published; `refused`: why its gate would not let it be promoted, "" if it would."""

    store: Store
    key: str
    ref: str
    outcome: Outcome
    reports: tuple[report.Report, ...]
    refused: str


def check_engine(target: Step, word: str) -> None:
    """Raise ValueError if the engine of this word, or "", does not run the checkpoint that a graph makes."""
    if not word:
        return
    form = getattr(target.spec.output, "form", None)
    if not isinstance(form, Form):
        raise ValueError(f"--engine {word} says what is to load a checkpoint, and {target.name} makes none; leave it away")
    form.check(word)


def asked(file: str | PathLike[str], given: Sequence[str], store: Store, build: pipeline.Build | None = None) -> recipe.Asked:
    """The graph of a pipeline, or of a recipe, with these parameters, when the sources that it names have answered."""
    return wait_out(lambda: recipe.asked(Path(file), given, build), store.patience, "a source", offline=OFFLINE)
