"""One run from the graph to a published version: checked before it starts, then run by the chosen runner."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from moeflow.extras import lacking
from moeflow.run import in_process
from moeflow.run.options import Options
from moeflow.run.outcome import CannotRun, Outcome, StepFailed
from moeflow.run.plan import Plan, plan
from moeflow.run.progress import Show
from moeflow.run.words import count
from moeflow.step import Step, upstream
from moeflow.store import CorruptBlob, Index, NotStored, Store, repair, versions
from moeflow.store.repair import Damage
from moeflow.store.runs import Mark

AGAIN = 3  # plans of a run beside which what was listed is deleted


class Runner(StrEnum):
    auto = "auto"
    process = "process"
    ray = "ray"

    def chosen(self) -> "Runner":
        """Resolve `auto`: `ray` if RAY_ADDRESS is set, as in a job that `ray job submit` starts, else `process`."""
        if self is not Runner.auto:
            return self
        return Runner.ray if os.environ.get("RAY_ADDRESS") else Runner.process

    @property
    def memory(self) -> int | None:
        """The bytes of this machine's memory if steps run here; None if they run on a cluster."""
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if self.chosen() is Runner.process else None


@dataclass(frozen=True)
class Prepared:
    """A run that may start; the runner reuses the listing that the plan was made from."""

    target: Step
    store: Store
    name: str
    runner: Runner
    index: Index
    plan: Plan
    mark: Mark

    @property
    def targets(self) -> list[Step]:
        return [self.target, *self.target.reports]


def prepare(target: Step, store: Store, *, name: str, runner: Runner, options: Options | None = None) -> Prepared:
    """Check all that can be checked before a step starts. Raises ValueError for the name, CannotRun for the first problem."""
    versions.check_name(name)
    runner = runner.chosen()
    if runner is Runner.ray and (why := lacking(["ray"])):
        raise CannotRun(why)
    targets = [target, *target.reports]
    steps = upstream(targets)
    mark = Mark(store, [s.key for s in steps])  # before what is stored is listed: garbage collection may be under way
    try:
        index, made = planned(targets, steps, store, runner)
        if made.problems:
            raise CannotRun(made.problems[0])
        if runner is Runner.process and made.keys("run"):
            (options or Options()).check_here()
    except BaseException:
        mark.end()
        raise
    return Prepared(target, store, name, runner, index, made, mark)


def planned(targets: Sequence[Step], steps: Iterable[Step], store: Store, runner: Runner) -> tuple[Index, Plan]:
    """What is stored, and the plan that follows: again, if what was listed is deleted before it is read, as garbage may be."""
    for _ in range(AGAIN):
        index = store.index({s.name for s in steps})
        with suppress(NotStored):
            return index, plan(targets, store, index=index, memory=runner.memory)
    index = store.index({s.name for s in steps})
    return index, plan(targets, store, index=index, memory=runner.memory)


def go(prepared: Prepared, *, progress: Show, options: Options, record: Mapping[str, Any]) -> tuple[Outcome, int]:
    """Run what is missing and publish the target; return the outcome and the version's number. Raises StepFailed."""
    run = in_process.run
    if prepared.runner is Runner.ray and prepared.plan.keys("run"):
        from moeflow.run.ray import runner as on_ray  # here, because importing ray takes longer than a run with nothing to do

        run = on_ray.run
    marked, running = replace(options, run=prepared.mark.name), {*prepared.plan.keys("run")}
    for step in upstream(prepared.targets):
        for note in step.notes if step.key in running else ():
            progress.say(f"{step.name}: {note}")
    reports = [s.key for s in prepared.target.reports]

    def attempt(index: Index | None) -> Outcome:
        outcome = run(prepared.targets, prepared.store, progress=progress, options=marked, index=index)
        if not versions.published(prepared.store, prepared.name, prepared.target.key, reports):
            repair.confirm(prepared.store, [prepared.target.key, *reports], outcome.intact)
        return outcome

    try:
        outcome = _mending(prepared.store, progress, attempt, prepared.index)
        n = versions.publish(prepared.store, prepared.name, prepared.target.key, reports=reports, record=record)
    finally:
        prepared.mark.end()
    return outcome, n


def _mending(store: Store, progress: Show, attempt: Callable[[Index | None], Outcome], index: Index) -> Outcome:
    """Run; where a step reads damaged bytes, drop them with everything computed from them, and run again.

    So it is with what another process deletes meanwhile. Raises StepFailed, also if the same bytes are damaged a second time.
    """
    known: Index | None = index
    dropped: set[str] = set()
    while True:
        try:
            return attempt(known)
        except (CorruptBlob, NotStored, StepFailed) as error:
            cause = _damaged(error)
            what = cause.name if isinstance(cause, CorruptBlob) else str(cause)
            if cause is None or what in dropped:
                raise
            dropped.add(what)
            if isinstance(cause, CorruptBlob):
                damage = repair.drop(store, {cause.name: cause.why})
                progress.say(f"warning: {cause.why}; {dropped_text(damage)}, to be computed again")
            else:
                progress.say(f"warning: {cause.args[0]}: it was deleted meanwhile, and is computed again")
            known = None


def _damaged(error: BaseException | None) -> CorruptBlob | NotStored | None:
    """The damaged or deleted object of the store behind an error, if that is its cause."""
    while error is not None:
        if isinstance(error, NotStored):
            return error
        if isinstance(error, CorruptBlob):
            return error if error.name else None
        error = error.cause if isinstance(error, StepFailed) else error.__cause__
    return None


def dropped_text(damage: Damage) -> str:
    """What went with damaged bytes, in words."""
    refs = ", ".join(v.ref for v in damage.versions)
    return f"dropped with {count(len(damage.keys), 'result')} that rest on it" + (f", and so {refs}" if refs else "")
