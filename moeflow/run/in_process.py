"""Run a graph in this process, one step after another: for tests, laptops, debuggers and single machines."""

from collections.abc import Iterable

from moeflow.run.call import Call
from moeflow.run.children import run_gang
from moeflow.run.ledger import Ledger
from moeflow.run.materialize import Done, materialize
from moeflow.run.options import Options
from moeflow.run.outcome import Outcome, StepFailed
from moeflow.run.progress import Show, show
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
    shown, retries = progress or show(), (options or Options()).retries
    outcome = None
    try:
        ledger = Ledger(targets, store, shown, index)
        ledger.settle()
        while calls := ledger.schedule.ready(1):
            (call,) = calls
            shown.start(call.key)
            try:
                done = _made(call, store, shown, retries)
            except Exception as error:
                raise StepFailed(ledger.schedule.steps[call.key], error) from error
            ledger.done(done)
            ledger.settle()
        assert ledger.left == 0, "steps are left although none failed"
        outcome = ledger.outcome()
    finally:
        shown.end(outcome)
    return outcome


def _made(call: Call, store: Store, shown: Show, retries: int) -> Done:
    return run_gang(call, store, shown, retries) if call.resources.processes else materialize(call, store, shown)
