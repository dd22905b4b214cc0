"""What EC2's machines have, as its API DescribeInstanceTypes tells it: a cluster file names only their types."""

import re
from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    cpus: int
    memory: int  # bytes
    gpus: int = 0
    device: int = 0  # bytes of each GPU
    gpu: str = ""  # its kind, as `moeflow.run.devices` names it


def _machines(family: str, gpu: str, gpu_mib: int, *sizes: tuple[str, int, int, int]) -> dict[str, Machine]:
    """`sizes`: name, CPUs, GiB of memory and GPUs of each."""
    return {f"{family}.{name}": Machine(cpus, gib * GIB, gpus, gpu_mib << 20, gpu) for name, cpus, gib, gpus in sizes}


_QUARTER = (
    ("xlarge", 4, 16, 1), ("2xlarge", 8, 32, 1), ("4xlarge", 16, 64, 1), ("8xlarge", 32, 128, 1), ("12xlarge", 48, 192, 4),
    ("16xlarge", 64, 256, 1),
)  # fmt: skip
_LARGE = (("24xlarge", 96, 384, 4), ("48xlarge", 192, 768, 8))
_GPUS = (
    _machines("g4dn", "t4", 16384, *_QUARTER, ("metal", 96, 384, 8))
    | _machines("g5", "a10g", 22888, *_QUARTER, *_LARGE)
    | _machines("g6", "l4", 22888, *_QUARTER, *_LARGE)
    | _machines("g6e", "l40s", 45776, *((name, cpus, 2 * gib, gpus) for name, cpus, gib, gpus in (*_QUARTER, *_LARGE)))
    | _machines("p4d", "a100", 40960, ("24xlarge", 96, 1152, 8))
    | _machines("p4de", "a100", 81920, ("24xlarge", 96, 1152, 8))
    | _machines("p5", "h100", 81920, ("4xlarge", 16, 256, 1), ("48xlarge", 192, 2048, 8))
    | _machines("p5e", "h200", 144384, ("48xlarge", 192, 2048, 8))
    | _machines("p5en", "h200", 144384, ("48xlarge", 192, 2048, 8))
    | _machines("p6-b200", "b200", 183359, ("48xlarge", 192, 2048, 8))
)
_WITHOUT = re.compile(r"(?!c5n)([cmr])[5-8](?:a|i|in|n|d|id|ad)?\.(\d*)xlarge")
_GIB_PER_CPU = {"c": 2, "m": 4, "r": 8}


def machine(name: str) -> Machine | None:
    """What a type of machine has; None if it is not known."""
    if match := _WITHOUT.fullmatch(name):
        cpus = 4 * int(match[2] or 1)
        return Machine(cpus, cpus * _GIB_PER_CPU[match[1]] * GIB)
    return _GPUS.get(name)


def with_gpus(kind: str) -> Machine:
    """The machine that has most GPUs of this kind. Raises ValueError if none is known."""
    machines = [m for m in _GPUS.values() if m.gpu == kind]
    if not machines:
        raise ValueError(f"no known machine has GPUs of the kind {kind!r}; name a cluster file with --on")
    return max(machines, key=lambda m: (m.gpus, m.device))
