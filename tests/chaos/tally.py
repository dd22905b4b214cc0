"""What the rounds came to: counted by kind and place, as a table and as JSON."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

COLUMNS = ("kind", "store", "rounds", "injected", "ended 0", "1", "2", "killed", "retries", "mismatches", "hangs", "wrong ends")


@dataclass
class Round:
    """One round: what was done to its runs, how those ended, and what was wrong afterwards."""

    kind: str
    store: str
    name: str  # which says how to have it again
    injected: Counter[str] = field(default_factory=Counter)  # kills, faults, flips, ...
    ends: Counter[str] = field(default_factory=Counter)  # exit codes of runs, "killed" for those that the round killed
    retries: int = 0  # runs that had to be started again
    mismatches: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # exit codes and last words that ought to be others
    absent: str = ""  # why such a round cannot be had here
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        return not (self.mismatches or self.hangs or self.wrong)


def sound(rounds: Sequence[Round]) -> bool:
    """Whether something was tried, and nothing was wrong."""
    return any(not r.absent for r in rounds) and all(r.sound for r in rounds)


def table(rounds: Sequence[Round]) -> str:
    """A Markdown table with a line for every kind on every store, and one for all."""
    rounds = [r for r in rounds if not r.absent]
    groups: dict[tuple[str, str], list[Round]] = {}
    for one in rounds:
        groups.setdefault((one.kind, one.store), []).append(one)
    lines = [_cells(*key, of) for key, of in groups.items()] + [_cells("all", "", rounds)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [COLUMNS, ["---"] * len(COLUMNS), *lines])


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """The same as JSON, with every round that was not sound in its own words."""
    absent = {r.kind: r.absent for r in rounds if r.absent}
    rounds = [r for r in rounds if not r.absent]
    injected: Counter[str] = sum((r.injected for r in rounds), Counter())
    return {
        "absent": absent,
        "rounds": len(rounds),
        "injected": dict(injected),
        "ends": dict(sum((r.ends for r in rounds), Counter[str]())),
        "unsound": [asdict(r) for r in rounds if not r.sound],
        "kinds": {f"{kind} {store}": n for (kind, store), n in Counter((r.kind, r.store) for r in rounds).items()},
    }


def _cells(kind: str, store: str, of: Iterable[Round]) -> list[Any]:
    rounds = [*of]
    injected: Counter[str] = sum((r.injected for r in rounds), Counter())
    ends: Counter[str] = sum((r.ends for r in rounds), Counter())
    what = ", ".join(f"{n} {name}" for name, n in sorted(injected.items()))
    counts = [sum(len(getattr(r, name)) for r in rounds) for name in ("mismatches", "hangs", "wrong")]
    codes = [ends[code] for code in ("0", "1", "2", "killed")]
    return [kind, store, len(rounds), what, *codes, sum(r.retries for r in rounds), *counts]
