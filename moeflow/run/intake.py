"""What a run reads from its sources, brought in before the rest is planned.

A plan cannot know whether new files hold new bytes, so it counts everything behind them as to be run. When the steps that read only
sources have run, early cutoff is decided by their contents, and a plan says what will really run.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from moeflow.run import in_process
from moeflow.run.go import Prepared, Runner, planned
from moeflow.run.options import Options
from moeflow.run.progress import Show
from moeflow.step import Step, step_of, upstream
from moeflow.store import CorruptBlob, NotStored


def readers(targets: Sequence[Step]) -> list[Step]:
    """The steps without inputs, which are sources, and those that read nothing but these."""
    return [s for s in upstream(targets) if all(not step_of(i).inputs for i in s.inputs)]


def brought(prepared: Prepared, *, progress: Show, options: Options, here: bool = False) -> Prepared:
    """The same run, planned again behind what it reads from its sources. Raises StepFailed, CannotRun, ClusterLost.

    `here`: in this process, because only this machine has the sources. Bytes of the store that are damaged or deleted meanwhile are
    left to the run itself, which mends them.
    """
    needed = {*prepared.plan.keys("run")}
    first = [s for s in readers(prepared.targets) if s.key in needed]
    if not first or len(first) == len(needed):
        return prepared
    run = in_process.run
    if prepared.runner is Runner.ray and not here:
        from moeflow.run.ray import runner as on_ray  # here, as in go.py

        run = on_ray.run
    with suppress(CorruptBlob, NotStored):
        run(first, prepared.store, progress=progress, options=replace(options, run=prepared.mark.name))
    index, plan = planned(prepared.targets, upstream(prepared.targets), prepared.store, prepared.runner)
    return replace(prepared, index=index, plan=plan)
