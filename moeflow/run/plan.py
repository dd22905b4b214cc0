"""What a run would do, from listings, the steps' specs, the free disk space and the nodes of a cluster file. Runs nothing."""

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moeflow.extras import lacking
from moeflow.machine import NO_COMPILER, compiler, has_gpu
from moeflow.run.node_kinds import NodeKinds
from moeflow.run.outcome import State
from moeflow.run.schedule import Schedule
from moeflow.run.words import count, labels, size
from moeflow.step import Step
from moeflow.store import Index, LocalBlobs, Store


@dataclass(frozen=True)
class Row:
    """One step. Bytes and operations are those of this run: zero if it does not run.

    For a gang, memory, CPUs, GPUs and device are those of each process.
    """

    key: str
    name: str
    label: str
    state: State
    reads: int
    writes: int
    operations: int  # floating-point ones, in this run
    memory: int  # peak bytes resident
    cpus: float
    gpus: float
    processes: int  # of a gang; 0 if it is none
    device: int  # peak bytes on its GPU, if it computes on one
    optional: bool  # with less memory it ends well, and leaves figures out
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """All steps, inputs before the steps that read them.

    A step that reads the output of a step that runs counts as "run": whether its inputs will be new is not known yet, but for parts
    that depend on nothing that has changed.
    """

    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    problems: tuple[str, ...]  # why a run cannot work; empty if it can

    def keys(self, state: State) -> list[str]:
        return [r.key for r in self.rows if r.state == state]

    @property
    def reads(self) -> int:
        return sum(r.reads for r in self.rows)

    @property
    def writes(self) -> int:
        return sum(r.writes for r in self.rows)

    @property
    def operations(self) -> int:
        return sum(r.operations for r in self.rows)

    @property
    def memory(self) -> int:
        """The most peak bytes of a step that runs, or of one process of a gang."""
        return max((r.memory for r in self.rows if r.state == "run"), default=0)

    @property
    def device(self) -> int:
        """The most bytes that a step that runs, or one process of a gang, takes of a GPU."""
        return max((r.device for r in self.rows if r.state == "run"), default=0)

    def json(self) -> dict[str, Any]:
        states: tuple[State, ...] = ("run", "stored", "same content", "not needed")
        return {
            "steps": {state: len(self.keys(state)) for state in states},
            "reads": self.reads,
            "writes": self.writes,
            "operations": self.operations,
            "memory": self.memory,
            "device": self.device,
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "rows": [asdict(row) for row in self.rows],
        }


def plan(
    targets: Iterable[Step], store: Store, *, index: Index | None = None, memory: int | None = None, nodes: NodeKinds | None = None
) -> Plan:
    """Plan a run of `targets`. Requests: a few listings, and the manifests of inputs that are read in part.

    `memory`: bytes of this machine, if the steps run here; CPUs are not limited then: a step in this process takes the threads
    that it asks for. `nodes`: those of the cluster that they run on; the disks are others then. Without both only the disk of a
    folder store is checked.
    """
    schedule = Schedule(targets, store, index)
    schedule.foretell()
    names, states = labels(list(schedule.steps.values())), schedule.states
    rows = tuple(_row(step, states[key], names[key]) for key, step in schedule.steps.items())
    problems = [] if nodes else _disk(rows, store, here=memory is not None)
    unfit = nodes.unfit(rows) if nodes else {} if memory is None else _memory(rows, memory)
    problems += [why for row, why in unfit.items() if not row.optional]
    if memory is not None:
        run = [schedule.steps[r.key] for r in rows if r.state == "run"]
        problems += [*_packages(run), *_compiler(run)]
    idle = {row.name for row in unfit if row.optional}  # they look at the memory first, and then read nothing
    rows = tuple(replace(row, reads=0, operations=0) if row.name in idle else row for row in rows)
    warnings = [
        *schedule.warnings(),
        *(f"{why}; until then it leaves its figures out" for row, why in unfit.items() if row.optional),
    ]
    return Plan(rows, tuple(warnings), tuple(problems))


def _row(step: Step, state: State, label: str) -> Row:
    spec, asked = step.spec, step.resources
    counted = round(asked.times * sum(n for kind, n in spec.operations.items() if kind != "text"))
    reads, writes, operations = (spec.reads, spec.writes, counted) if state == "run" else (0, 0, 0)
    memory = asked.memory or spec.memory
    device = asked.device or (spec.device if asked.gpus else 0)
    needs = memory, asked.cpus, asked.gpus, asked.processes, device
    return Row(step.key, step.name, label, state, reads, writes, operations, *needs, spec.optional, spec.notes + step.notes)


def _disk(rows: Iterable[Row], store: Store, *, here: bool) -> list[str]:
    """A folder needs room for all that is written; a bucket has it, but this node's cache needs room for one step's files."""
    writes = [r.writes for r in rows if r.state == "run"]
    local = isinstance(store.blobs, LocalBlobs)
    if not writes or not (local or here):
        return []
    folder = Path(store.url) if local else store.cache
    need, free = sum(writes) if local else max(writes), shutil.disk_usage(_existing(folder)).free
    if need <= free:
        return []
    way_out = "pass another --store" if local else "point MOEFLOW_CACHE to another disk"
    return [f"{folder} has {size(free)} free, and the run writes {size(need)} there; free some, or {way_out}"]


def _packages(steps: Iterable[Step]) -> list[str]:
    """One line if a step imports what is not installed here."""
    lacks = ((step, lacking(step.spec.packages)) for step in steps)
    return [f"{step.name}: {why}" for step, why in lacks if why][:1]


def _compiler(steps: Iterable[Step]) -> list[str]:
    """One line if a step compiles what it runs, and this machine has neither a compiler nor a GPU to do without one."""
    step = next((s for s in steps if s.spec.compiles and not (s.resources.gpus and has_gpu())), None)
    return [] if step is None or compiler() else [f"{step.name}: {NO_COMPILER}"]


def _existing(folder: Path) -> Path:
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def _memory(rows: Iterable[Row], memory: int) -> dict[Row, str]:
    """The first row of each step name whose process, or whose gang's processes together, this machine cannot hold, and why."""
    problems: dict[str, tuple[Row, str]] = {}
    for row in (r for r in rows if r.state == "run"):
        need = row.memory * max(row.processes, 1)
        if need > memory:
            gang = f" for its {count(row.processes, 'process', 'es')}" if row.processes > 1 else ""
            advice = "take a larger one, or say what it needs with .on()"
            problem = f"{row.label} needs {size(need)}{gang} and the largest node has {size(memory)}; {advice}"
            problems.setdefault(row.name, (row, problem))
    return dict(problems.values())
