"""The kinds of nodes that a cluster file for `ray up` names, and what of a plan none of them could run. Starts nothing."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moeflow.run.machines import Machine, machine
from moeflow.run.words import count, size

if TYPE_CHECKING:
    from moeflow.run.plan import Row

FOR_STEPS = 0.7
"""The part of a node's memory that Ray gives to steps; the rest is its object store's."""
GPU_MEMORY = "gpu-memory-gib"
"""The label of a node kind that says how many GiB each of its GPUs has, for machines that `machine` does not know."""


@dataclass(frozen=True)
class NodeKind:
    """One kind of node: what it offers to steps, and how many of it there are at most."""

    name: str
    cpus: float
    memory: int  # bytes that steps may take
    gpus: int
    device: int  # bytes of each GPU
    most: int

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
        workers = [room for room, most in rooms for _ in range(most)][: self.workers]
        room = sum(workers) + sum(kind.room(row, gpus=gpus) for kind in self.kinds if kind.name == self.head)
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
        each, way_out = (" for each process", "run more of them") if row.processes else ("", "divide the work")
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
    if head not in types:
        raise ValueError(f"{path}: head_node_type={head!r} is none of available_node_types ({', '.join(map(str, types))})")
    if type(workers) is not int or workers < 0:
        raise ValueError(f"{path}: max_workers={workers!r} must be a number of nodes")
    kinds = tuple(_kind(f"{path}: available_node_types.{name}", str(name), of, name == head, workers) for name, of in types.items())
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
    return NodeKind(
        name,
        _number(f"{where}.resources.CPU", resources.get("CPU", known.cpus)),
        int(_number(f"{where}.resources.memory", resources.get("memory", known.memory * FOR_STEPS))),
        int(gpus),
        device,
        1 if head else int(_number(f"{where}.max_workers", described.get("max_workers", workers))),
    )


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not re.fullmatch(r"\d+(\.\d+)?", str(value)):
        raise ValueError(f"{where}={value!r} must be a number, zero or more")
    return float(value)
