"""What a run would take on the nodes of a cluster, by simulating it: the same schedule, with time that passes by itself.

Each event is a step that ends or a node that joins. What may run is asked of `Schedule`, as a run asks; where it runs follows the
rules of Ray and of `moeflow.run.ray.nodes`. Runs nothing, and touches no cluster.
"""

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count

from moeflow.run.call import Call
from moeflow.run.devices import GPUS, Device
from moeflow.run.durations import BUCKET, Duration, Durations
from moeflow.run.node_kinds import NodeKind, NodeKinds
from moeflow.run.plan import Plan, Row
from moeflow.run.schedule import Schedule
from moeflow.step import Step, step_of
from moeflow.store import Index, LocalBlobs, Store

BOOT = 300.0
"""Seconds from asking for a node until it takes steps: the machine's start, the image, `setup_commands`."""
LIBRARIES = 5.0
"""Seconds until a process that has computed nothing yet has loaded torch, transformers and tokenizers out of memory; from a disk on
which nothing was read yet it took 16."""
SUBMITTED = 0.02
"""Seconds between a step's end and its readers' start: the driver's heartbeat is 0.2, and it learns of most ends within it."""


@dataclass(frozen=True)
class Chain:
    """The steps that no number of nodes makes shorter, from the first to the last: without what loading libraries takes, and what
    is fetched from a bucket, which a node may have or not."""

    seconds: float
    names: tuple[str, ...]
    parts: tuple[tuple[str, float], ...]  # seconds by name of step, most first


@dataclass(frozen=True)
class Simulation:
    """How a run went. Seconds of devices are GPUs', or CPUs' where the nodes have no GPU."""

    seconds: float
    nodes: tuple[tuple[str, int], ...]  # how many there were of each kind
    gpus: int
    cpus: float
    held: float  # seconds of devices, from the node's start to the run's end
    busy: float  # seconds of devices in which a step held them
    dollars: float | None  # None: not all prices are said
    chain: Chain
    steps: int
    known: int  # steps whose duration finished steps tell
    gangs: dict[str, float] = field(default_factory=dict)  # seconds by label
    lost: dict[str, float] = field(default_factory=dict)  # seconds that a gang's lost process costs at most, by label

    @property
    def utilisation(self) -> float:
        return self.busy / self.held if self.held else 0.0


@dataclass
class _Node:
    kind: NodeKind
    cpus: float
    memory: float
    gpus: float
    joined: float
    processes: int = 0  # that have loaded the libraries
    computing: int = 0
    cached: set[str] = field(default_factory=set)

    def room(self, need: "_Need") -> bool:
        return self.cpus + 1e-9 >= need.cpus and self.gpus + 1e-9 >= need.gpus and self.memory >= need.memory

    def take(self, need: "_Need", sign: int = 1) -> None:
        self.cpus, self.gpus, self.memory = (
            self.cpus - sign * need.cpus,
            self.gpus - sign * need.gpus,
            self.memory - sign * need.memory,
        )

    @property
    def device(self) -> Device | None:
        return GPUS.get(self.kind.gpu)

    @property
    def used(self) -> float:
        return max(1 - self.cpus / max(self.kind.cpus, 1e-9), 1 - self.gpus / self.kind.gpus if self.kind.gpus else 0)


@dataclass(frozen=True)
class _Need:
    cpus: float
    gpus: float
    memory: float

    def covers(self, other: "_Need") -> bool:
        return self.cpus >= other.cpus and self.gpus >= other.gpus and self.memory >= other.memory


def simulate(
    targets: Iterable[Step], store: Store, plan: Plan, nodes: NodeKinds, durations: Durations, *, index: Index | None = None
) -> Simulation | None:
    """Simulate a run of `targets`, of which `plan` is the plan; None if there is nothing to run or a step that no node takes.

    Requests: as a plan's, if there is no `index`.
    """
    run = _Run(Schedule(targets, store, index), store, plan, nodes, durations)
    return run.result() if run.go() else None


class _Run:
    def __init__(self, schedule: Schedule, store: Store, plan: Plan, nodes: NodeKinds, durations: Durations) -> None:
        self.schedule, self.nodes, self.durations = schedule, nodes, durations
        self.rows = {row.key: row for row in plan.rows if row.state == "run"}
        self.in_bucket = not isinstance(store.blobs, LocalBlobs)
        self.with_gpus = any(kind.gpus for kind in nodes.kinds)
        self.took: dict[str, Duration] = {}
        self.least: dict[str, float] = {}  # seconds that a step takes on any node
        self.now, self.queue, self.running = 0.0, deque[str](), 0
        self.calls: dict[str, Call] = {}
        self.events: list[tuple[float, int, str, list[_Node]]] = []
        self.order = count()  # of events at the same time
        self.there: list[_Node] = []
        self.busy = 0.0
        self.sizes = {key: listed.bytes for key, listed in schedule.index.keys.items()}
        for kind, joined in nodes.all([*self.rows.values()]):
            node = _Node(kind, kind.cpus, kind.memory, kind.gpus if self.with_gpus else 0, BOOT * joined)
            self.there.append(node)
            if node.joined:
                self._push(node.joined, "", [])
        self.largest = max((n.kind.memory for n in self.there), default=0)

    def go(self) -> bool:
        """Run until nothing is left; whether everything could run."""
        self.schedule.foretell()  # as the plan did
        self._settle()
        while True:
            for call in self.schedule.ready(self._room()):
                self.calls[call.key] = call
                self.queue.append(call.key)
            self._start()
            if not self.events:
                return bool(self.took) and not self.queue
            self.now, _, key, held = heapq.heappop(self.events)
            if key:
                self._end(key, held)

    def result(self) -> Simulation:
        used = [n for n in self.there if n.joined <= self.now]
        unit = [n.kind.gpus if self.with_gpus else n.kind.cpus for n in used]
        prices = [n.kind.price for n in used]
        hours = [(self.now - n.joined + (BOOT if n.joined else 0)) / 3600 for n in used]
        dollars = None
        if all(p is not None for p in prices):
            dollars = sum((p or 0) * h for p, h in zip(prices, hours, strict=True))
        gangs = {k: r for k, r in self.rows.items() if r.processes and k in self.took}
        return Simulation(
            self.now,
            tuple(Counter(n.kind.name for n in used).items()),
            sum(n.kind.gpus for n in used) if self.with_gpus else 0,
            sum(n.kind.cpus for n in used),
            sum(u * h * 3600 for u, h in zip(unit, hours, strict=True)),
            self.busy,
            dollars,
            self._chain(),
            len(self.took),
            sum(d.known for d in self.took.values()),
            {r.label: self.took[k].seconds for k, r in gangs.items()},
            {r.label: self.took[k].seconds * self.schedule.steps[k].resources.repeats for k, r in gangs.items()},
        )

    def _room(self) -> int:
        """As the driver: what may run or queue at once goes by the CPUs that are there."""
        if self.nodes.serial:
            return 1 - self.running - len(self.queue)
        cpus = sum(n.kind.cpus for n in self.there if n.joined <= self.now)
        return max(0, int(2 * cpus + 8) - self.running - len(self.queue))

    def _settle(self) -> None:
        self.schedule.settle()
        while aliases := self.schedule.aliases():
            for alias in aliases:
                self.schedule.present(alias.call.key)
            self.schedule.settle()

    def _start(self) -> None:
        """Start what fits, in the order of the queue."""
        refused: list[_Need] = []
        waiting: deque[str] = deque()
        while self.queue:
            key = self.queue.popleft()
            row = self.rows[key]
            need = self._need(row)
            held = None if any(need.covers(other) for other in refused) else self._place(key, need, row.processes)
            if held is None:
                waiting.append(key)
                if not row.processes:
                    refused.append(need)
            else:
                self._begin(key, need, held)
        self.queue = waiting

    def _need(self, row: Row) -> _Need:
        memory = min(row.memory, self.largest) if row.optional else row.memory
        return _Need(row.cpus, row.gpus if self.with_gpus else 0.0, memory)

    def _place(self, key: str, need: _Need, processes: int) -> list[_Node] | None:
        """The node of each process; None if they do not fit now. With a bucket a step prefers the node with most of its inputs."""
        free = [n for n in self.there if n.joined <= self.now]
        if processes:
            held: list[_Node] = []
            for node in free:
                while len(held) < processes and node.room(need):
                    node.take(need)
                    held.append(node)
            for node in held:
                node.take(need, -1)
            return held if len(held) == processes else None
        free = [n for n in free if n.room(need)]
        if not free:
            return None
        votes = {id(n): sum(self.sizes.get(k, 0) + 1 for k in self._inputs(key) if k in n.cached) for n in free}
        most = max(votes.values()) if self.in_bucket else 0
        if most:
            return [next(n for n in free if votes[id(n)] == most)]
        # Ray keeps steps without GPUs off nodes that have some, fills nodes up to a half, and then spreads
        return [min(free, key=lambda n: (bool(n.kind.gpus) and not need.gpus, n.used if n.used >= 0.5 else 0.0))]

    def _inputs(self, key: str) -> list[str]:
        return [step_of(i).key for i in self.schedule.steps[key].inputs]

    def _begin(self, key: str, need: _Need, held: list[_Node]) -> None:
        step, row, node = self.schedule.steps[key], self.rows[key], held[0]
        idle, apart = row.optional and not row.reads, any(one is not node for one in held)
        devices = {one.kind.gpu: one.device for one in held}.values()
        each = (self.durations.of(step, device, idle=idle, apart=apart) for device in devices)
        took = self.took[key] = max(each, key=lambda duration: duration.skewed)  # a gang is as fast as its slowest process
        began = stored = 0.0
        computes = bool(step.spec.operations)
        for one in held:
            one.take(need)
            if computes and one.computing >= one.processes:
                began, one.processes = LIBRARIES, one.processes + 1
            one.computing += computes
        if self.in_bucket:  # what the node does not have comes from there, and what the step makes goes there
            network = node.device.network if node.device else BUCKET
            sizes = {k: self.sizes.get(k, 0) + 1 for k in self._inputs(key)}
            far = sum(size for k, size in sizes.items() if k not in node.cached) / max(1, sum(sizes.values()))
            reads = 0.0 if took.known else row.reads * far  # finished steps fetched theirs while they were timed
            began += reads / min(BUCKET, network)
            stored = row.writes / min(BUCKET, network)
            node.cached.update(sizes, (key,))
        self.sizes[key] = row.writes
        self.least[key] = took.skewed + stored
        seconds = began + self.least[key]
        self.busy += (need.gpus if self.with_gpus else need.cpus) * seconds * len(held)
        self.running += 1
        self._push(self.now + seconds + (0 if self.nodes.serial else SUBMITTED), key, held)

    def _end(self, key: str, held: list[_Node]) -> None:
        need, computes = self._need(self.rows[key]), bool(self.schedule.steps[key].spec.operations)
        for node in held:
            node.take(need, -1)
            node.computing -= computes
        self.running -= 1
        self.schedule.made(key, f"simulated {key}", {p: f"simulated {key}/{p}" for p in self.calls[key].parts})
        self._settle()

    def _push(self, at: float, key: str, held: list[_Node]) -> None:
        heapq.heappush(self.events, (at, next(self.order), key, held))

    def _chain(self) -> Chain:
        longest: dict[str, tuple[float, str]] = {}  # by step: when it could end at the earliest, and after which input
        for key, step in self.schedule.steps.items():
            if key in self.took:
                before = max(((longest[k][0], k) for i in step.inputs if (k := step_of(i).key) in longest), default=(0.0, ""))
                longest[key] = before[0] + self.least[key], before[1]
        at = max(longest, key=lambda k: longest[k][0])
        seconds = longest[at][0]
        names: list[str] = []
        parts: dict[str, float] = defaultdict(float)
        while at:
            names.append(self.schedule.steps[at].name)
            parts[names[-1]] += self.least[at]
            at = longest[at][1]
        ordered = sorted(parts.items(), key=lambda part: -part[1])
        return Chain(seconds, tuple(reversed(names)), tuple(ordered))
