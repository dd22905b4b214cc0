"""The families of checkpoints that moeflow can read. Adding one: a constant and its place in `FAMILIES`, a tiny model in tests/."""

from moeflow.arch.families import FAMILIES, MIXTRAL
from moeflow.arch.family import Family, essential, family_config
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
    is_number,
    layer_of,
)

__all__ = [
    "ARCH", "COMPRESSED", "EMBEDDING", "FAMILIES", "FINAL_NORM", "HEAD", "LAYERS", "MAIN", "MATRICES", "MIXTRAL",
    "Arch", "Config", "Family", "Layout", "Stacked", "essential", "family_config", "is_number", "layer_of",
    "layout_in_memory",
]  # fmt: skip
