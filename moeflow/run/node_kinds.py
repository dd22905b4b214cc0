"""The kinds of nodes that a cluster file for `ray up` names, and what of a plan none of them could run. Starts nothing."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moeflow.machine import gpu_model
from moeflow.run import devices
from moeflow.run.machines import Machine, machine, with_gpus
from moeflow.run.words import count, size

if TYPE_CHECKING:
    from moeflow.run.plan import Row

FOR_STEPS = 0.7
"""The part of a node's memory that Ray gives to steps; the rest is its object store's."""
GPU_MEMORY = "gpu-memory-gib"
"""The label of a node kind that says how many GiB each of its GPUs has, for machines that `machine` does not know."""
GPU_KIND = "gpu-kind"
"""The label that says of which kind its GPUs are, by a name that `devices` knows."""
MOST_GPUS = 65_536
PRICE = "dollars-per-hour"
"""The label that says what a node costs. Labels are the one place for it that Ray's schema of cluster files leaves."""


@dataclass(frozen=True)
class NodeKind:
    """One kind of node: what it offers to steps, and how many of it there are at most."""

    name: str
    cpus: float
    memory: int  # bytes that steps may take
    gpus: int
    device: int  # bytes of each GPU
    most: int
    least: int = 0  # that are there from the start
    gpu: str = ""  # the kind of its GPUs, "" if it has none or they are not known
    price: float | None = None  # dollars an hour

    def room(self, row: "Row", *, gpus: bool) -> int:
        """How many times one empty node of this kind holds a step, or a process of a gang."""
        asked = {"cpus": row.cpus, "memory": row.memory, "gpus": row.gpus if gpus else 0}
        if asked["gpus"] and row.device > self.device * min(1, row.gpus):  # a step computes on one GPU, or on a part of one
            return 0
        return min((int(getattr(self, name) / need + 1e-9) for name, need in asked.items() if need), default=1 << 30)

    def words(self, *, gpus: bool) -> str:
        """For example `gpu: 48 CPUs, 268.8 GiB of memory, 4 GPUs of 44.7 GiB`."""
        there = f", {count(self.gpus, 'GPU')} of {size(self.device)}" if self.gpus and gpus else ""
        return f"{self.name}: {self.cpus:g} CPUs, {size(self.memory)} of memory{there}"


@dataclass(frozen=True)
class NodeKinds:
    """All kinds of nodes of one cluster file."""

    file: str
    kinds: tuple[NodeKind, ...]
    workers: int  # nodes besides the head, at most
    head: str
    serial: bool = False  # one step runs after another, in one process

    @property
    def unknown(self) -> str:
        """Why no time can be told: the kind of some GPUs is not known; empty if all are."""
        names = [kind.name for kind in self.kinds if kind.gpus and not kind.gpu]
        if not names:
            return ""
        where = f"{self.file}: available_node_types.{names[0]}"
        return f"{where}: how long steps take is not known without the kind of its GPUs; say it, as labels: {{{GPU_KIND}: h100}}"

    def all(self, rows: Sequence["Row"]) -> list[tuple[NodeKind, bool]]:
        """Each node that these rows could have at once, the head first, and whether it has to be started.

        The others are those that are there from the start, then such that every row finds room, and then those with GPUs first;
        besides the head at most as many as there may be, and as there are processes, since more have nothing to do.
        """
        head = [kind for kind in self.kinds if kind.name == self.head]
        others = sorted((kind for kind in self.kinds if kind.name != self.head), key=lambda kind: not kind.gpus)
        there = [kind for kind in others for _ in range(min(kind.least, kind.most))][: self.workers]
        least, left = len(there), Counter({kind: kind.most for kind in others})
        left.subtract(there)
        most = min(self.workers, max(least, sum(max(1, row.processes) for row in rows)))
        gpus = any(kind.gpus for kind in self.kinds)

        def free(row: "Row") -> NodeKind | None:
            fits = [kind for kind in others if left[kind] > 0 and kind.room(row, gpus=gpus)]
            return max(fits, key=lambda kind: kind.room(row, gpus=gpus) if row.processes else 1, default=None)

        alike = {(row.cpus, row.gpus, row.memory, row.device, row.processes): row for row in rows}
        for row in alike.values():
            room = sum(n * kind.room(row, gpus=gpus) for kind, n in Counter((*head, *there)).items())
            while room < max(1, row.processes) and len(there) < most and (kind := free(row)):
                there.append(kind)
                left[kind] -= 1
                room += kind.room(row, gpus=gpus)
        more = (kind for kind in others for _ in range(left[kind]))
        there += islice(more, max(0, most - len(there)))
        return [(kind, False) for kind in (*head, *there[:least])] + [(kind, True) for kind in there[least:]]

    def unfit(self, rows: Iterable["Row"]) -> dict["Row", str]:
        """For each step name the row that would run and asks for most of what no node has, and why it cannot run here."""
        gpus = any(kind.gpus for kind in self.kinds)  # without any, steps compute on CPUs
        found: dict[str, tuple[Row, str]] = {}
        for row in rows:
            if row.state == "run" and (why := self._why(row, gpus=gpus)):
                worst = found.get(row.name)
                if worst is None or (row.device, row.memory) > (worst[0].device, worst[0].memory):
                    found[row.name] = row, why
        return dict(found.values())

    def _why(self, row: "Row", *, gpus: bool) -> str:
        """Why the cluster can never run this step; empty if it can."""
        rooms = sorted(((kind.room(row, gpus=gpus), kind.most) for kind in self.kinds if kind.name != self.head), reverse=True)
        room, left = 0, self.workers
        for fit, most in rooms:
            room, left = room + fit * min(most, left), left - min(most, left)
        room += sum(kind.room(row, gpus=gpus) for kind in self.kinds if kind.name == self.head)
        if room >= max(row.processes, 1):
            return ""
        asked = f"{row.cpus:g} CPUs, {size(row.memory)} of memory"
        if gpus and row.gpus:
            asked += f" and {row.gpus:g} GPU with {size(row.device)}"
        if room:
            return (
                f"{row.label} is a gang of {count(row.processes, 'process', 'es')} of {asked} each, and all nodes of {self.file} "
                f"together have room for {room:,}; raise max_workers there, or run fewer processes"
            )
        each, way_out = "", "divide the work"
        if row.processes:
            each, way_out = " for each process", "run more of them"
        if row.processes and gpus and row.gpus:
            way_out += "; with gang.device_memory what would fit is told"
        kinds = "; ".join(kind.words(gpus=gpus) for kind in self.kinds)
        return f"{row.label} needs {asked}{each}, and no node of {self.file} has that ({kinds}); name larger ones, or {way_out}"


def read(path: Path) -> NodeKinds:
    """Read the node kinds of a cluster file. Raises ValueError, naming the field, and FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"--on {path}: there is no such file; give a cluster file as `ray up` takes it")
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    types = config.get("available_node_types") if isinstance(config, dict) else None
    if not isinstance(types, dict) or not types:
        raise ValueError(f"{path}: available_node_types names no kind of node; give a cluster file as `ray up` takes it")
    head, workers = config.get("head_node_type"), config.get("max_workers", 2)
    if not isinstance(head, str | int) or head not in types:
        raise ValueError(f"{path}: head_node_type={head!r} is none of available_node_types ({', '.join(map(str, types))})")
    if type(workers) is not int or workers < 0:
        raise ValueError(f"{path}: max_workers={workers!r} must be a number of nodes")
    every = [_kind(f"{path}: available_node_types.{name}", str(name), of, name == head, workers) for name, of in types.items()]
    kinds = tuple(kind for kind in every if kind.name == str(head) or (kind.most and workers))  # of others there is never a node
    return NodeKinds(str(path), kinds, workers, str(head))


def _kind(where: str, name: str, described: Any, head: bool, workers: int) -> NodeKind:
    if not isinstance(described, dict):
        raise ValueError(f"{where} must say node_config and resources, and is {described!r}")
    fields = {field: described.get(field) or {} for field in ("node_config", "resources", "labels")}
    for field, value in fields.items():
        if not isinstance(value, dict):
            raise ValueError(f"{where}.{field} must hold names and values, and is {value!r}")
    config, resources, labels = fields.values()
    named = str(config.get("InstanceType") or config.get("machineType") or "")
    known = machine(named)
    if known is None and not {"CPU", "memory"} <= resources.keys():
        what = f"the machine {named!r} is not known" if named else "no InstanceType is named"
        raise ValueError(f"{where}: {what}; say what it has, as resources: {{CPU: ..., memory: ...}} in bytes, and GPU: ...")
    known = known or Machine(0, 0)
    gpus = _number(f"{where}.resources.GPU", resources.get("GPU", known.gpus))
    device = int(_number(f"{where}.labels.{GPU_MEMORY}", labels[GPU_MEMORY]) * 2**30) if GPU_MEMORY in labels else known.device
    if gpus and not device:
        raise ValueError(f'{where}: the memory of its GPUs is not known; say it in GiB, as labels: {{{GPU_MEMORY}: "80"}}')
    kind = labels.get(GPU_KIND, known.gpu)
    if GPU_KIND in labels:
        kind = devices.gpu(str(kind), f"{where}.labels.{GPU_KIND}").kind
    most = 1 if head else int(_number(f"{where}.max_workers", described.get("max_workers", workers)))
    least = int(_number(f"{where}.min_workers", described.get("min_workers", 0)))
    if not head and least > min(most, workers):
        raise ValueError(f"{where}: min_workers={least} is more than the {min(most, workers)} that max_workers allows")
    return NodeKind(
        name,
        _number(f"{where}.resources.CPU", resources.get("CPU", known.cpus)),
        int(_number(f"{where}.resources.memory", resources.get("memory", known.memory * FOR_STEPS))),
        int(gpus),
        device,
        most,
        least,
        kind if gpus else "",
        _number(f"{where}.labels.{PRICE}", labels[PRICE]) if PRICE in labels else None,
    )


def of_gpus(kind: str, count: float | None) -> NodeKinds:
    """So many GPUs of a kind, in the machines that EC2 has them in, all there from the start. Raises ValueError."""
    device = devices.gpu(kind, "--gpu-kind").kind
    if count is None or not 1 <= count <= MOST_GPUS or count != int(count):
        raise ValueError(
            f"--gpu-kind {kind} needs --gpus, how many of them there are, as a whole number from 1 to {MOST_GPUS:,}; it is {count}"
        )
    of, left, kinds = with_gpus(device), int(count), []
    while left:
        gpus = min(left, of.gpus)
        cpus, memory = of.cpus / of.gpus * gpus, int(of.memory / of.gpus * gpus * FOR_STEPS)
        most = left // gpus
        kinds.append(NodeKind(f"{gpus}-{device}", cpus, memory, gpus, of.device, most, most, device))
        left -= most * gpus
    return NodeKinds(f"--gpus {count:g} --gpu-kind {kind}", tuple(kinds), sum(k.most for k in kinds), "")


def here(memory: int) -> NodeKinds | None:
    """This machine, where steps run one after another; None if it has a GPU of an unknown kind."""
    model = gpu_model()
    gpu = next((kind for kind in devices.GPUS if model and devices.is_kind(model, kind)), "")
    if model and not gpu:
        return None
    kind = NodeKind("this machine", os.cpu_count() or 1, memory, 1 if gpu else 0, 1 << 50, 1, 1, gpu)
    return NodeKinds("this machine", (kind,), 1, "", serial=True)


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not re.fullmatch(r"\d+(\.\d+)?(e[+-]?\d+)?", str(value)):
        raise ValueError(f"{where}={value!r} must be a number, zero or more")
    return float(value)
