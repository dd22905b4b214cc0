"""What both runners share: the schedule, the outcome of each step so far, and what is shown about it."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from moeflow.run.materialize import Done, alias
from moeflow.run.outcome import Outcome, State, StepOutcome
from moeflow.run.progress import Show, show
from moeflow.run.schedule import Schedule
from moeflow.step import Step
from moeflow.store import Index, Store

THREADS = 16


class Ledger:
    """Tracks a run; writes no artifacts except aliases, which need no work."""

    def __init__(self, targets: Iterable[Step], store: Store, show: Show, index: Index | None) -> None:
        self._began = time.monotonic()
        self.store, self.show = store, show
        self.schedule = Schedule(targets, store, index)
        self.schedule.settle()
        states = self.schedule.states
        self.left = sum(s in ("run", "same content") for s in states.values())
        self._done: dict[str, Done] = {}
        self._warnings: list[str] = []
        show.begin(self.schedule.steps.values(), self.left, stored=[*states.values()].count("stored"))
        store.renew(self.schedule.relied(), self.schedule.index)
        for warning in self.schedule.warnings():
            self.warn(warning)

    def settle(self) -> None:
        """Decide what can be decided, and store the aliases."""
        self.schedule.settle()
        while aliases := self.schedule.aliases():
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(lambda a: alias(a.call, a.of, self.store), aliases))
            self.left -= len(aliases)
            self.show.taken([a.call.key for a in aliases])
            for a in aliases:
                self.schedule.present(a.call.key)
            self.schedule.settle()

    def done(self, done: Done) -> None:
        """Record that a step is stored, by this run or meanwhile by another."""
        self.left -= 1
        self._done[done.key] = done
        self.show.finish(done.key)
        self.schedule.made(done.key, done.digest, done.parts)

    def warn(self, text: str) -> None:
        self._warnings.append(text)
        self.show.say(f"warning: {text}")

    def outcome(self) -> Outcome:
        steps = [self._of(key, state) for key, state in self.schedule.states.items()]
        intact = frozenset().union(*(done.intact for done in self._done.values()))
        return Outcome(tuple(steps), time.monotonic() - self._began, tuple(self._warnings), intact)

    def _of(self, key: str, state: State) -> StepOutcome:
        name = self.schedule.steps[key].name
        if (done := self._done.get(key)) is None:
            return StepOutcome(key, name, state)
        state = "run" if done.ran else "stored"
        return StepOutcome(key, name, state, done.reads, done.writes, done.seconds, done.notes)


def follow(
    targets: Iterable[Step], store: Store, execute: Callable[[Ledger], None], progress: Show | None, index: Index | None
) -> Outcome:
    """Open a ledger, let `execute` run what is ready until nothing is left, and show how the run ended. Raises what it raises."""
    shown, outcome = progress or show(), None
    try:
        ledger = Ledger(targets, store, shown, index)
        ledger.settle()
        execute(ledger)
        assert ledger.left == 0, "steps are left although none failed"
        outcome = ledger.outcome()
    finally:
        shown.end(outcome)
    return outcome
