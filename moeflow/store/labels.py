"""Labels: words like "production" that point at a version. Every move is a record of its own, so their history is kept.

A label moves by a conditional create: of two that move it at once, one wins, and the other is told. Knows no gate.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moeflow.nearest import meant
from moeflow.store.errors import LabelMoved, NotStored
from moeflow.store.records import RECORD, newest, now, read_record
from moeflow.store.store import Store


@dataclass(frozen=True)
class Move:
    """The n-th time that a label was pointed at a version."""

    label: str
    n: int
    ref: str  # name@n of the version
    created: str  # UTC, ISO 8601
    about: Mapping[str, Any] = field(default_factory=dict)
    """Who moved it ("by"), what the gate said ("gate"), whether it was forced ("forced") and why ("why")."""
    back_to: int = 0
    """Of a rollback: the move that it went back to; else 0."""


def last(store: Store, label: str) -> Move | None:
    """Where a label points now; None if it points nowhere yet."""
    while n := newest(store, f"labels/{label}/"):
        if (there := _read(store, label, n)) is not None:  # else it was deleted since it was listed
            return there
    return None


def history(store: Store, label: str) -> tuple[Move, ...]:
    """Every move of a label, the first one first. Raises NotStored if there is no such label."""
    moves = tuple(m for n in _numbers(store, label) if (m := _read(store, label, n)) is not None)
    if not moves:
        advice = meant(label, pointing(store), "`moeflow ls` shows those there are")
        raise NotStored(f"there is no label {label!r} in {store.url}; {advice}")
    return moves


def pointing(store: Store) -> dict[str, Move]:
    """Where every label points now, by label."""
    at: dict[str, int] = {}
    for entry in store.blobs.list("labels/"):
        if RECORD.fullmatch(entry.name):
            _, label, name = entry.name.split("/")
            at[label] = max(at.get(label, 0), int(name.removesuffix(".json")))
    return {label: there for label in sorted(at) if (there := _read(store, label, at[label]) or last(store, label)) is not None}


def move(store: Store, label: str, ref: str, *, since: int, about: Mapping[str, Any] | None = None, back_to: int = 0) -> Move:
    """Point a label at the version `ref`, if it was moved `since` times until now. Raises LabelMoved if it was moved meanwhile."""
    name, _, number = ref.partition("@")
    made = Move(label, since + 1, ref, now(), dict(about or {}), back_to)
    record = {"name": name, "n": int(number), "created": made.created, "about": made.about}
    record |= {"back_to": back_to} if back_to else {}
    if store.blobs.create(_at(label, since + 1), json.dumps(record).encode()):
        return made
    there = last(store, label)
    if there is not None and there.ref == ref:
        return there
    where = f"to {there.ref} by {there.about.get('by', 'somebody')}" if there else "elsewhere"
    raise LabelMoved(f"{label} was moved {where} meanwhile, so it stays there; look at `moeflow history {label}`, then try again")


def before(store: Store, there: Move) -> Move | None:
    """The move that a rollback from `there` goes back to: the one before it, or before the one that it went back to itself.

    Moves whose records somebody has deleted are passed over.
    """
    for n in reversed([n for n in _numbers(store, there.label) if n < (there.back_to or there.n)]):
        earlier = _read(store, there.label, n)
        if earlier is not None and earlier.back_to:
            earlier = _read(store, there.label, earlier.back_to)
        if earlier is not None:
            return earlier
    return None


def _numbers(store: Store, label: str) -> list[int]:
    """The numbers of a label's moves, in order."""
    names = (e.name for e in store.blobs.list(f"labels/{label}/") if RECORD.fullmatch(e.name))
    return sorted(int(name.rpartition("/")[2].removesuffix(".json")) for name in names)


def _read(store: Store, label: str, n: int) -> Move | None:
    """One move; None if its record is gone."""
    try:
        raw = read_record(store, _at(label, n))
    except FileNotFoundError:
        return None
    return Move(label, n, f"{raw['name']}@{raw['n']}", raw["created"], dict(raw.get("about") or {}), int(raw.get("back_to") or 0))


def _at(label: str, n: int) -> str:
    return f"labels/{label}/{n:06d}.json"
