"""What a run would do, from listings, the steps' specs and the size of the disk. Starts nothing."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeflow.run.outcome import State
from moeflow.run.schedule import Schedule
from moeflow.run.words import count, labels, size
from moeflow.step import Step
from moeflow.store import Index, LocalBlobs, Store


@dataclass(frozen=True)
class Capacity:
    """What the largest single node offers to one step; 0 where it is not known."""

    cpus: float = 0
    gpus: float = 0
    memory: int = 0  # bytes
    alone: bool = False  # whether all processes of a gang must share that node

    @staticmethod
    def here() -> "Capacity":
        """This machine's memory. Its CPUs are no bound: a step in this process takes the threads that it asks for."""
        return Capacity(memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), alone=True)


@dataclass(frozen=True)
class Row:
    """One step. Bytes are those it would read and write in this run, so zero for one that does not run.

    Of a gang, memory, CPUs, GPUs and device are those of each of its processes.
    """

    key: str
    name: str
    label: str
    state: State
    reads: int
    writes: int
    memory: int  # peak bytes resident
    cpus: float
    gpus: float
    processes: int  # of a gang; 0 for a step that is none
    device: int  # bytes on its device
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """All steps, inputs before what reads them.

    A step behind one that runs counts as one that runs, too: whether its inputs' contents are new is known only then.
    """

    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    problems: tuple[str, ...]  # why a run cannot work; empty when it can

    def keys(self, state: State) -> list[str]:
        return [r.key for r in self.rows if r.state == state]

    @property
    def reads(self) -> int:
        return sum(r.reads for r in self.rows)

    @property
    def writes(self) -> int:
        return sum(r.writes for r in self.rows)

    @property
    def memory(self) -> int:
        """Peak bytes of the hungriest step that runs, or of a process of it."""
        return max((r.memory for r in self.rows if r.state == "run"), default=0)

    def json(self) -> dict[str, Any]:
        states: tuple[State, ...] = ("run", "stored", "same content", "not needed")
        return {
            "steps": {state: len(self.keys(state)) for state in states},
            "reads": self.reads,
            "writes": self.writes,
            "memory": self.memory,
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "rows": [asdict(row) for row in self.rows],
        }


def plan(targets: Iterable[Step], store: Store, *, index: Index | None = None, capacity: Capacity | None = None) -> Plan:
    """Say what a run of `targets` would do. Requests: a few listings, and manifests of inputs read in part.

    `capacity`: what one node offers, where that is known; without it only a folder store's disk is checked.
    """
    schedule = Schedule(targets, store, index)
    schedule.settle()
    names, states = labels(list(schedule.steps.values())), schedule.states
    rows = tuple(_row(step, states[key], names[key]) for key, step in schedule.steps.items())
    problems = [*_disk(rows, store, capacity), *_nodes(rows, capacity)]
    return Plan(rows, tuple(schedule.warnings()), tuple(problems))


def _row(step: Step, state: State, label: str) -> Row:
    spec, asked = step.spec, step.resources
    reads, writes = (spec.reads, spec.writes) if state == "run" else (0, 0)
    memory = asked.memory or spec.memory
    needs = memory, asked.cpus, asked.gpus, asked.processes, asked.device
    return Row(step.key, step.name, label, state, reads, writes, *needs, spec.notes)


def _disk(rows: Iterable[Row], store: Store, capacity: Capacity | None) -> list[str]:
    """A folder must have room for all that is written; a bucket has, but this node holds one step's files at a time."""
    writes = [r.writes for r in rows if r.state == "run"]
    local = isinstance(store.blobs, LocalBlobs)
    if not writes or not (local or capacity):
        return []
    folder = Path(store.url) if local else store.cache
    need, free = sum(writes) if local else max(writes), shutil.disk_usage(_existing(folder)).free
    if need <= free:
        return []
    way_out = "pass another --store" if local else "point MOEFLOW_CACHE to another disk"
    return [f"{folder} has {size(free)} free, and the run writes {size(need)} there; free some, or {way_out}"]


def _existing(folder: Path) -> Path:
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def _nodes(rows: Iterable[Row], capacity: Capacity | None) -> list[str]:
    """One line for each name of a step that no node could take."""
    if capacity is None:
        return []
    found: dict[str, str] = {}
    for row in (r for r in rows if r.state == "run"):
        together = max(row.processes, 1) if capacity.alone else 1
        if capacity.memory and row.memory * together > capacity.memory:
            need, offer = size(row.memory * together), size(capacity.memory)
            need += f" for its {count(row.processes, 'process', 'es')}" if together > 1 else ""
        elif capacity.cpus and row.cpus > capacity.cpus:
            need, offer = count(int(row.cpus), "CPU"), f"{capacity.cpus:g}"
        elif capacity.gpus and row.gpus > capacity.gpus:
            need, offer = count(int(row.gpus), "GPU"), f"{capacity.gpus:g}"
        else:
            continue
        way_out = "take a larger one, or say what it needs with .on()"
        found.setdefault(row.name, f"{row.label} needs {need} and the largest node has {offer}; {way_out}")
    return list(found.values())
