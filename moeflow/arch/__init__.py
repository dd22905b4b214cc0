"""What is known of a checkpoint's model: its numbers, the names of its tensors, how its router chooses. No torch."""

from moeflow.arch.family import Family
from moeflow.arch.layout import Layout, Stacked, layout_in_memory
from moeflow.arch.spec import (
    ARCH,
    COMPRESSED,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LAYERS,
    MAIN,
    MATRICES,
    Arch,
    Config,
    essential,
    family_config,
    is_number,
    layer_of,
)

__all__ = [
    "ARCH", "COMPRESSED", "EMBEDDING", "FINAL_NORM", "HEAD", "LAYERS", "MAIN", "MATRICES",
    "Arch", "Config", "Family", "Layout", "Stacked", "essential", "family_config", "is_number", "layer_of",
    "layout_in_memory",
]  # fmt: skip
