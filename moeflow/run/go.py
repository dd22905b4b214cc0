"""One run from the graph to a published version: checked before it starts, on the runner that was asked for."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from moeflow.run import in_process
from moeflow.run.options import Options
from moeflow.run.outcome import CannotRun, Outcome
from moeflow.run.plan import Capacity, Plan, plan
from moeflow.run.progress import Show
from moeflow.step import Step, upstream
from moeflow.store import Index, Store, versions


class Runner(StrEnum):
    auto = "auto"
    process = "process"
    ray = "ray"

    def chosen(self) -> "Runner":
        """`ray job submit` sets RAY_ADDRESS, so that a job uses its cluster without being told."""
        if self is not Runner.auto:
            return self
        return Runner.ray if os.environ.get("RAY_ADDRESS") else Runner.process


@dataclass(frozen=True)
class Prepared:
    """A run that may start: what was listed for its plan serves the runner too."""

    target: Step
    store: Store
    name: str
    runner: Runner
    index: Index
    plan: Plan

    @property
    def targets(self) -> list[Step]:
        return [self.target, *self.target.reports]


def prepare(target: Step, store: Store, *, name: str, runner: Runner) -> Prepared:
    """Everything that can be refused before a step starts. Raises CannotRun for the first thing that cannot work."""
    if not versions.NAME.fullmatch(name):
        raise CannotRun(f"name {name!r}: use letters, digits, '.', '_' and '-', beginning with a letter or digit")
    runner = runner.chosen()
    targets = [target, *target.reports]
    index = store.index({s.name for s in upstream(targets)})
    capacity = Capacity.here() if runner is Runner.process else None
    planned = plan(targets, store, index=index, capacity=capacity)
    if planned.problems:
        raise CannotRun(planned.problems[0])
    return Prepared(target, store, name, runner, index, planned)


def go(prepared: Prepared, *, progress: Show, options: Options, record: Mapping[str, Any]) -> tuple[Outcome, int]:
    """Run what is missing and publish the target; what happened, and the number of the version. Raises StepFailed."""
    run = in_process.run
    if prepared.runner is Runner.ray and prepared.plan.keys("run"):
        from moeflow.run.ray import runner as on_ray  # here, because importing ray takes longer than a run that has nothing to do

        run = on_ray.run
    outcome = run(prepared.targets, prepared.store, progress=progress, options=options, index=prepared.index)
    reports = [s.key for s in prepared.target.reports]
    return outcome, versions.publish(prepared.store, prepared.name, prepared.target.key, reports=reports, record=record)


def fleeting(folder: Path) -> bool:
    """Whether a folder belongs to a Ray job's working directory, which goes when the cluster does."""
    return "working_dir_files" in folder.absolute().parts
