"""Run a graph in this process, one step after another: for tests, laptops, debuggers and single machines."""

import time
from collections import deque
from collections.abc import Iterable

from moeflow.run.call import Call
from moeflow.run.children import run_gang
from moeflow.run.ledger import Ledger, follow
from moeflow.run.materialize import materialize
from moeflow.run.options import Options
from moeflow.run.outcome import Outcome, StepFailed
from moeflow.run.progress import Show
from moeflow.step import Step
from moeflow.store import Index, Store
from moeflow.store.claims import LOOK, Busy, claimed


def run(
    targets: Iterable[Step],
    store: Store,
    *,
    progress: Show | None = None,
    options: Options | None = None,
    index: Index | None = None,
) -> Outcome:
    """Store the targets and what they need. Raises StepFailed; finished steps stay stored.

    Of `options` only `run` and the retries count, these for gangs, whose processes are children of this one and may be lost.
    `index`: a listing made before, to save another.
    """
    options = options or Options()

    def execute(ledger: Ledger) -> None:
        waiting: deque[Call] = deque()  # for other runs, which compute them
        while calls := ledger.schedule.ready(1) or waiting:
            if calls is waiting:
                time.sleep(LOOK)
            call = calls.popleft() if calls is waiting else calls[0]
            ledger.show.start(call.key)
            try:
                if call.resources.processes:
                    with claimed(store, call.key, options.run):
                        done = run_gang(call, store, ledger.show, options.retries)
                else:
                    done = materialize(call, store, ledger.show, options.run)
            except Busy as busy:
                ledger.show.waits("another run", str(busy))
                waiting.append(call)
            except Exception as error:
                raise StepFailed(ledger.schedule.steps[call.key], error) from error
            else:
                ledger.done(done)
                ledger.settle()

    return follow(targets, store, execute, progress, index)
