"""What devices do at most, from their makers' data sheets, and the part of it that steps reach.

Sources and measurements are in docs/decisions/20-simulated-schedules.md. Figures with sparsity are halved.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from moeflow.step import Arithmetic


@dataclass(frozen=True)
class Device:
    """One GPU, or one core of a CPU. Operations a second are those of dense products."""

    kind: str
    half: float  # operations a second in fp16 and bf16
    single: float  # in fp32
    double: float  # in fp64
    memory: float  # bytes a second between it and its memory
    links: float = 0.0  # bytes a second to another GPU of its node
    network: float = 1e9  # bytes a second to other nodes, where all GPUs of its node send at once
    shares: "Shares | None" = None

    def seconds(self, operations: Mapping[Arithmetic, int]) -> float:
        """How long one device takes for these operations, one kind after another, at the share of its peak that steps reach."""
        shares = self.shares or ON_GPUS
        rates: dict[Arithmetic, float] = {
            "bfloat16": self.half * shares.products,
            "float16": self.half * shares.products,
            "float32": self.single * shares.products,
            "float64": self.double * shares.products,
            "factors": self.single * shares.factors,
            "text": TEXT,
        }
        return sum(n / rates[kind] for kind, n in operations.items())


@dataclass(frozen=True)
class Shares:
    """The part of a device's peak that steps reach where no finished step says better."""

    products: float  # of matrices
    factors: float  # eigenvalues and triangular factors, of the peak in fp32


TEXT = 4e6
"""Bytes of text that one core cuts into tokens in a second."""
ON_GPUS = Shares(0.35, 0.04)
"""Assumed, and measured on no GPU."""
CORE = Device("cpu", 1e9, 80e9, 40e9, 10e9, shares=Shares(0.3, 0.25))
"""A core with two fp32 units of 256 bits at 2.5 GHz; without units for bf16, which it computes in software."""
GPUS: Mapping[str, Device] = {
    device.kind: device
    for device in (
        Device("t4", 65e12, 8.1e12, 0.25e12, 300e9, 16e9, 1.5e9),
        Device("a10g", 70e12, 35e12, 0.5e12, 600e9, 32e9, 1.3e9),
        Device("l4", 121e12, 30.3e12, 0.5e12, 300e9, 32e9, 1.3e9),
        Device("l40s", 362e12, 91.6e12, 1.4e12, 864e9, 32e9, 3.1e9),
        Device("a100", 312e12, 19.5e12, 9.7e12, 1555e9, 300e9, 6.2e9),
        Device("h100", 989e12, 67e12, 34e12, 3350e9, 450e9, 50e9),
        Device("h200", 989e12, 67e12, 34e12, 4800e9, 450e9, 50e9),
        Device("b200", 2250e12, 75e12, 37e12, 7700e9, 900e9, 50e9),
    )
}


def gpu(kind: str, where: str) -> Device:
    """The GPU of this kind. Raises ValueError, naming `where` it was asked for, if it is not known."""
    try:
        return GPUS[kind.lower()]
    except KeyError:
        raise ValueError(f"{where}={kind!r} is no known kind of GPU; say one of {', '.join(GPUS)}") from None


def is_kind(name: str, kind: str) -> bool:
    """Whether a device that its driver calls `name` ("NVIDIA H100 80GB HBM3") is of this kind; "" is a CPU."""
    return kind in (re.findall(r"[a-z0-9]+", name.lower()) if name else ["cpu"])
