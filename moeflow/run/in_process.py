"""Run a graph in this process, one step after another: for tests, laptops, debuggers and single machines."""

from collections.abc import Iterable

from moeflow.run.children import run_gang
from moeflow.run.ledger import Ledger, follow
from moeflow.run.materialize import materialize
from moeflow.run.options import Options
from moeflow.run.outcome import Outcome, StepFailed
from moeflow.run.progress import Show
from moeflow.step import Step
from moeflow.store import Index, Store


def run(
    targets: Iterable[Step],
    store: Store,
    *,
    progress: Show | None = None,
    options: Options | None = None,
    index: Index | None = None,
) -> Outcome:
    """Store the targets and what they need. Raises StepFailed; finished steps stay stored.

    Of `options` only the retries count, for gangs, whose processes are children of this one and may be lost. `index`: a
    listing made before, to save another.
    """
    retries = (options or Options()).retries

    def execute(ledger: Ledger) -> None:
        while calls := ledger.schedule.ready(1):
            (call,) = calls
            ledger.show.start(call.key)
            try:
                gang = call.resources.processes > 0
                done = run_gang(call, store, ledger.show, retries) if gang else materialize(call, store, ledger.show)
            except Exception as error:
                raise StepFailed(ledger.schedule.steps[call.key], error) from error
            ledger.done(done)
            ledger.settle()

    return follow(targets, store, execute, progress, index)
