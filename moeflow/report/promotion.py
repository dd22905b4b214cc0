"""Whether a label may point at a version: its gate is asked, and what it said is kept with the move."""

import getpass
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from moeflow.report.figures import Figure, read_figures, sayable
from moeflow.report.gate import Decision, bound, judge, passed, refusal
from moeflow.store import Store, labels, versions
from moeflow.store.labels import Move
from moeflow.store.versions import Version


class NotPassed(Exception):
    """The gate refuses the version."""


@dataclass(frozen=True)
class Considered:
    """A version that is to get a label, and what its gate says of it."""

    label: str
    version: Version
    there: Move | None
    """Where the label points now; None if nowhere yet."""
    decisions: tuple[Decision, ...]
    figures: tuple[Figure, ...]
    promoted: tuple[Figure, ...] | None
    """The figures of the version that the label points at; None if there is none."""

    @property
    def passed(self) -> bool:
        return passed(self.decisions)


def consider(store: Store, ref: str, label: str, gate: Iterable[str] = ()) -> Considered:
    """Ask the gate that the version's record names, and these bounds beside it. Raises ValueError, NotStored."""
    version = versions.promotable(store, ref, label)
    there = labels.last(store, label)
    bounds = [bound(word) for word in dict.fromkeys((*version.record.get("gate", ()), *gate))]
    figures = read_figures(store, version.reports)
    served = _served(store, there) if there is not None else None
    promoted = None if served is None else read_figures(store, served.reports)
    return Considered(label, version, there, judge(bounds, figures, promoted), figures, promoted)


def _served(store: Store, there: Move) -> Version | None:
    served = versions.resolve(store, there.ref)
    return served if isinstance(served, Version) else None


def promote(store: Store, considered: Considered, *, forced: bool = False, why: str = "") -> Version:
    """Point the label at the version. Raises NotPassed if the gate refuses it and it is not forced, and LabelMoved."""
    if forced and not why.strip():
        raise ValueError("--force needs a reason: say it with --why '...', which is kept in the label's history")
    if not considered.passed and not forced:
        ref, label = considered.version.ref, considered.label
        raise NotPassed(
            f"{ref} does not pass its gate, so {label} stays where it is: {refusal(considered.decisions)}; "
            f"to promote it all the same: moeflow promote {ref} {label} --force --why '...'"
        )
    about: dict[str, Any] = {"by": who(), "gate": [sayable(asdict(d)) for d in considered.decisions]}
    about |= {"forced": True} if not considered.passed else {}
    about |= {"why": why} if why else {}
    since = considered.there.n if considered.there else 0
    return versions.promote(store, considered.version.ref, considered.label, about=about, since=since)


def who() -> str:
    """Who is at work: user@machine."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container may run as a number that has no name
        user = "somebody"
    return f"{user}@{socket.gethostname()}"
