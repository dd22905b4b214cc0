"""One run as somebody asks for it, on the command line or in Python: the same words, checks and record."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from moeflow.run import pipeline
from moeflow.run.go import Prepared, Runner, go, prepare
from moeflow.run.opening import open_store, pipeline_file, seconds
from moeflow.run.options import Options
from moeflow.run.outcome import Outcome
from moeflow.run.progress import Show
from moeflow.step import Step
from moeflow.store import Store
from moeflow.store.patience import heard, wait_out


@dataclass(frozen=True)
class Job:
    """A pipeline with the words of its parameters, and where and how it is to run.

    `store`: a folder or an address, "" for the usual folder. `name`: what the result is published as, "" for the name of the
    pipeline's file. `patience`: how long a store or a source that does not answer is waited for, as in 15m. `build`: the
    pipeline's function, if it is loaded already.
    """

    file: str | PathLike[str]
    given: Sequence[str] = ()
    store: str = ""
    name: str = ""
    runner: Runner = Runner.auto
    options: Options = field(default_factory=Options)
    patience: str = "15m"
    build: pipeline.Build | None = None

    @property
    def path(self) -> Path:
        return pipeline_file(self.file)

    @property
    def record(self) -> dict[str, Any]:
        """What the version remembers of how it was asked for."""
        return {"pipeline": str(self.file), "given": [*self.given]}

    def prepared(self, show: Show) -> Prepared:
        """Everything checked that can be before a step starts. Raises what a wrong request raises."""
        with heard(show.waits):
            store = open_store(self.store, seconds("--patience", self.patience))
            target = self.options.place(called(self.build or pipeline.load(self.path), self.given, store))
            return prepare(target, store, name=self.name or self.path.stem, runner=self.runner, options=self.options)

    def go(self, prepared: Prepared, show: Show) -> tuple[Outcome, int]:
        """Run what is missing and publish the result; return the outcome and the version's number. Raises StepFailed."""
        with heard(show.waits):
            if not self.store and "working_dir_files" in Path.cwd().parts:  # of a Ray job, which is deleted with the cluster
                url = prepared.store.url
                show.say(f"warning: the store {url} goes with the Ray cluster; pass --store to keep what this run makes")
            return go(prepared, progress=show, options=self.options, record=self.record)


def called(build: pipeline.Build, given: Sequence[str], store: Store) -> Step:
    """The graph of a pipeline with these parameters, when the sources that it names have answered."""
    return wait_out(lambda: pipeline.call(build, given), store.patience, "a source")
