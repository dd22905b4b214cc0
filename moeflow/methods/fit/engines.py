"""What each engine runs of what moeflow writes, and what it keeps in memory. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """One engine that loads a result."""

    counts: bool
    """Layers may differ in their number of experts."""
    ranks: bool
    """Experts may be products of two matrices."""
    gone: bool
    """Layers may lack their MoE block."""
    bits: tuple[int, ...]
    """The bits of packed experts that it loads."""
    mixed: bool
    """Layers may differ in their bits, and packed layers lie beside whole ones."""
    unpacks: bool
    """Packed experts take their unpacked bytes in memory."""
    source: str
    """Where that is known from."""


ENGINES: Mapping[str, Engine] = {
    "transformers": Engine(
        counts=False, ranks=False, gone=False, bits=(8, 4), mixed=False, unpacks=True,
        source="transformers 5.23, measured: its classes have one number of experts, and unpack packed ones of one scheme",
    ),
    "moeflow": Engine(
        counts=True, ranks=True, gone=True, bits=(8, 4, 3, 2), mixed=True, unpacks=True,
        source="moeflow.model.compressed on transformers 5.23, measured by this project's tests",
    ),
}  # fmt: skip
"""transformers alone, and transformers after `import moeflow`."""
