"""Run a graph here, one step after another: for tests, laptops, debuggers and single machines."""

from collections.abc import Iterable

from moeflow.run.ledger import Ledger
from moeflow.run.materialize import materialize
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
    """Store the targets and what they need. Raises StepFailed; what had finished stays stored.

    `options` are for runners that can lose a worker; `index` is a listing made before, to spare another.
    """
    shown = progress or show()
    outcome = None
    try:
        ledger = Ledger(targets, store, shown, index)
        ledger.settle()
        while calls := ledger.schedule.ready(1):
            (call,) = calls
            shown.start(call.key)
            try:
                done = materialize(call, store, shown)
            except Exception as error:
                raise StepFailed(ledger.schedule.steps[call.key], error) from error
            ledger.done(done)
            ledger.settle()
        assert ledger.left == 0, "steps are left although none failed"
        outcome = ledger.outcome()
    finally:
        shown.end(outcome)
    return outcome
