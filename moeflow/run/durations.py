"""How long a step takes: by what finished steps of its name took, else by its operations and bytes. Runs nothing."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from math import exp, inf, log
from statistics import NormalDist, median, pstdev
from typing import get_args

from moeflow.run.devices import CORE, Device, is_kind
from moeflow.step import Arithmetic, Step
from moeflow.store import Index, Store

STEP = 0.05
"""Seconds that any step takes beside its work, without its process."""
DISK = 1e9
"""Bytes a second at which a step reads and verifies, or writes, what lies on its node."""
BUCKET = 0.5e9
"""Bytes a second between a step and a bucket, at most; less where its node's network is slower."""
SKEW = 0.1
"""The standard deviation of the logarithm of durations of equal steps, where finished ones do not tell it."""
LOOKED_AT = 16
"""So many finished steps of a name, the latest, are looked at."""
ALIKE = 30.0
"""Finished steps of so many times more or less work tell nothing about a step."""
GANG = 35.0
"""Seconds until all processes of a gang have started, as a finished run on two CPUs took."""


@dataclass(frozen=True)
class Work:
    """What one step, or one process of a gang, does."""

    operations: Mapping[Arithmetic, int]
    moved: int  # bytes read and written
    threads: int = 1
    exchanged: int = 0  # bytes that a process of a gang sends to the others

    def seconds(self, device: Device | None, *, apart: bool = False) -> float:
        """On this GPU, or on as many cores as it has threads. `apart`: a gang's processes lie on several nodes."""
        computing = (device or CORE).seconds(self.operations) / (1 if device else self.threads)
        links = (device.network if apart else device.links) if device else DISK
        return STEP + computing + self.moved / DISK + self.exchanged / links

    @property
    def counted(self) -> int:
        return sum(self.operations.values())

    def likeness(self, other: "Work") -> float:
        """How many times more one does than the other, by operations, or by bytes where neither has any."""
        one, two = (w.counted if self.counted or other.counted else w.moved for w in (self, other))
        return inf if not one or not two else max(one / two, two / one)


@dataclass(frozen=True)
class Finished:
    """A step of the store, and how long its function took."""

    work: Work
    seconds: float
    device: str  # as its driver calls the GPU; "" for a CPU


@dataclass(frozen=True)
class Duration:
    """`seconds` as the mean of equal steps, and `skewed` as this one of them takes."""

    seconds: float
    skewed: float
    known: bool  # by finished steps


@dataclass(frozen=True)
class Durations:
    """How long steps take, by what finished ones took."""

    finished: Mapping[str, tuple[Finished, ...]] = field(default_factory=dict)

    def of(self, step: Step, gpu: Device | None, *, idle: bool = False, apart: bool = False) -> Duration:
        """On a node with this GPU, or without one. Starting processes and reaching a bucket are not in it.

        `idle`: the step finds too little memory, and ends at once. `apart`: a gang's processes lie on several nodes.
        """
        if idle:
            return Duration(STEP, STEP, False)
        device = gpu if step.resources.gpus else None
        work, share = work_of(step), min(1.0, step.resources.gpus) if device else 1.0
        modelled = work.seconds(device, apart=apart) / share
        ratios = self._ratios(step.name, work, device)
        mean = modelled * (median(ratios) if ratios else 1.0)
        spread = min(0.5, max(0.02, pstdev(map(log, ratios)))) if len(ratios) > 3 else SKEW
        mean += step.spec.writes / DISK  # what it has written is read once more, to be hashed and stored
        if step.resources.processes:
            mean += GANG
            spread = 0.0  # the slowest process is the gang's speed
        return Duration(mean, mean * exp(spread * _drawn(step.key)), bool(ratios))

    def _ratios(self, name: str, work: Work, device: Device | None) -> list[float]:
        """How much longer finished steps like this one took than their operations and bytes say."""
        kind = device.kind if device else "cpu"
        alike = [f for f in self.finished.get(name, ()) if is_kind(f.device, kind) and work.likeness(f.work) <= ALIKE]
        return [max(f.seconds, 1e-4) / f.work.seconds(device) for f in alike]


def work_of(step: Step) -> Work:
    """What the step does by its spec; of a gang, what each process does."""
    moved = (step.spec.reads + step.spec.writes) // max(1, step.resources.processes)
    return Work(step.operations, moved, max(1, int(step.resources.cpus)), step.resources.exchanged)


def finished(steps: Iterable[Step], store: Store, index: Index) -> dict[str, tuple[Finished, ...]]:
    """What the latest stored steps of these names took, but for those that loaded libraries or went on from a saved state.

    Requests: their manifests.
    """
    known = {s.key: s for s in steps}
    keys: dict[str, list[str]] = defaultdict(list)
    names = {s.name for s in known.values()}
    for key in sorted(index.keys, key=lambda k: -index.modified[k]):
        name = key.rpartition("-")[0]
        if name in names and len(keys[name]) < LOOKED_AT:
            keys[name].append(key)
    made: dict[str, list[Finished]] = defaultdict(list)
    for m in store.manifests([k for several in keys.values() for k in several]).values():
        gpu, threads = m.machine.get("gpu"), m.machine.get("threads")
        gang = [n if type(n := m.machine.get(word, 0)) is int else 0 for word in ("processes", "exchanged")]
        counted = {kind: n for kind in get_args(Arithmetic) if type(n := m.operations.get(kind)) is int}
        if not isinstance(gpu, str) or not isinstance(threads, int):  # of an older version
            continue
        if m.seconds and not m.same_as and not m.machine.get("loaded") and not m.machine.get("resumed"):
            moved = (m.reads + m.bytes) // max(1, gang[0])
            made[m.step].append(Finished(Work(counted, moved, max(1, threads), gang[1]), m.seconds, gpu))
    return {name: tuple(several) for name, several in made.items()}


def _drawn(key: str) -> float:
    """A draw from a normal distribution that is the same for a key on every machine."""
    part = (int.from_bytes(sha256(key.encode()).digest()[:4]) + 0.5) / 2**32
    return NormalDist().inv_cdf(part)
