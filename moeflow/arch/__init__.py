"""The families of checkpoints that moeflow can read. Adding one: a constant, a place in `FAMILIES`, a tiny model in tests/."""

from moeflow.arch.family import FAMILIES, Family, Kind
from moeflow.arch.mixtral import MIXTRAL
from moeflow.arch.spec import COMPRESSED, EMBEDDING, FINAL_NORM, HEAD, LAYERS, MAIN, MATRICES, Arch, Config, essential, layer_of

__all__ = [
    "COMPRESSED", "EMBEDDING", "FAMILIES", "FINAL_NORM", "HEAD", "LAYERS", "MAIN", "MATRICES", "MIXTRAL",
    "Arch", "Config", "Family", "Kind", "essential", "layer_of",
]  # fmt: skip
