"""One round's stage: a store of its own, the commands that run on it, and what is compared after each of them."""

import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from moeflow.store import Store
from tests.chaos.driver import Driver, Ended, Program
from tests.chaos.places import Place
from tests.chaos.tally import Round
from tests.chaos.truth import KEEPS, Truth

LIMIT = 240.0  # seconds after which a command counts as hanging
AGAIN = 3  # peaceful runs in which a round must come to its end


@dataclass
class Scene:
    place: Place
    truth: Truth
    random: Random
    round: Round
    folder: Path  # of this round
    url: str  # of an empty store
    cache: Path  # of the node, where the store is not a folder
    limit: float = LIMIT

    def store(self) -> Store:
        """The store as one sees it who has cached nothing."""
        return Store.open(self.url, self.folder / "looking")

    def start(self, keep: int = KEEPS[0], *more: str, largest: int = 0) -> Driver:
        """A run in a process of its own."""
        words = self.truth.run(self.url, keep, "--runner", "process", *more)
        return Driver(words, self.folder / "said", largest=largest, MOEFLOW_CACHE=str(self.cache))

    def start_on(self, address: str, keep: int = KEEPS[0], *more: str) -> Program:
        """A run on the Ray cluster at an address."""
        words = self.truth.run(self.url, keep, "--runner", "ray", *more)
        return Program(words, self.folder / "said", MOEFLOW_CACHE=str(self.cache), RAY_ADDRESS=address, RAY_AUTH_MODE="disabled")

    def command(self, *words: str, may: tuple[int, ...] = (0,)) -> Ended:
        """Another command on this store, to its end."""
        ended = Driver([*words, "--store", self.url], self.folder / "said", MOEFLOW_CACHE=str(self.cache)).wait(self.limit)
        self._judge(words[0], ended, may)
        return ended

    def ended(self, driver: Driver, keep: int = KEEPS[0], *, may: tuple[int, ...] = (0,), limit: float = 0.0) -> int:
        """The exit code of a run that comes to its end by itself, which must be one of `may`; what is stored is compared."""
        ended = driver.wait(limit or self.limit)
        self._judge(f"run keep={keep}", ended, may)
        self.round.ends["killed" if ended.code < 0 else str(ended.code)] += 1
        self._compare(keep if ended.code == 0 else 0)
        return ended.code

    def killed(self, driver: Driver) -> None:
        """SIGKILL a run, unless it has ended."""
        if not driver.kill():
            self.ended(driver)
            return
        driver.wait(30)
        self.round.injected["kills"] += 1
        self.round.ends["killed"] += 1
        self._compare(0)

    def finish(self, keep: int = KEEPS[0]) -> None:
        """Run in peace until it is done, pull, and compare every byte."""
        for attempt in range(AGAIN):
            if self.ended(self.start(keep), keep, may=(0, 1) if attempt + 1 < AGAIN else (0,)) == 0:
                self.round.retries += attempt
                break
        self.pull(keep)

    def pull(self, keep: int, may: tuple[int, ...] = (0,)) -> None:
        """Pull what was published last, and compare every byte."""
        into = self.folder / f"pulled-{time.monotonic_ns()}"
        if self.command("pull", f"chaos-{keep}", str(into), may=may).code == 0:
            self.round.mismatches += self.truth.pulled_differs(into, keep)

    def _compare(self, keep: int) -> None:
        self.round.mismatches += self.truth.differs(self.url, self.folder / "looking", keep)

    def _judge(self, what: str, ended: Ended, may: tuple[int, ...]) -> None:
        if ended.hung:
            self.round.hangs.append(f"{what} did not end in {ended.seconds:.0f} s: {ended.line}")
        elif ended.code not in may:
            self.round.wrong.append(f"{what} ended with {ended.code}: {ended.line}")
        elif why := ended.improper:
            self.round.wrong.append(f"{what}: {why}")
