"""What a layer's file takes, counted from its header: bytes on disk, bytes in an engine's memory, operations of a token."""

from collections.abc import Mapping
from math import prod

from moeflow.arch import EMBEDDING, HEAD, Config, Family
from moeflow.methods.fit.engines import Engine
from moeflow.model.header import TensorInfo
from moeflow.model.layout import experts_in, headers
from moeflow.model.packed import PACKED, numels
from moeflow.model.spec import element_bytes
from moeflow.step import Artifact


def size(artifact: Artifact, unit: str, engine: Engine, config: Config, layer: int | None = None) -> float:
    """How much one layer takes, or the rest of the model (`layer` is none), in the unit of a `Budget`."""
    if unit == "bytes":
        return sum(artifact.size(n) for n in artifact.names() if n.endswith(".safetensors"))
    tensors = headers(artifact)
    if unit == "resident":
        return _resident(tensors, engine, config, layer)
    if layer is None:
        head = tensors.get(HEAD) or tensors[EMBEDDING]
        return 2 * prod(head.shape)
    return _operations(tensors, config, layer)


def _resident(tensors: Mapping[str, TensorInfo], engine: Engine, config: Config, layer: int | None) -> float:
    """The bytes in memory: unpacked where the engine unpacks, and every rank as large as the layer's largest of that matrix."""
    stored, element = {n: t.shape for n, t in tensors.items()}, element_bytes(config, "auto")
    each = numels(stored, config)
    unpacked = engine.unpacks and any(n.endswith(PACKED) for n in stored)
    bytes_ = sum(each.values()) * element if unpacked else sum(t.nbytes for t in tensors.values())
    if layer is None:
        return bytes_
    family = Family.of(config)
    experts = [family.expert(layer, e) for e in range(experts_in(stored, config, layer))]
    padding = 0
    for matrix in zip(*experts, strict=True):
        for factor in zip(*map(family.factors, matrix), strict=True):
            sizes = [each.get(name, 0) for name in factor]
            padding += sum(max(sizes) - size for size in sizes if size)
    return bytes_ + padding * element


def _operations(tensors: Mapping[str, TensorInfo], config: Config, layer: int) -> float:
    """Two for each weight of each matrix that a token is multiplied with; attention over positions is left out."""
    family, stored = Family.of(config), {n: t.shape for n, t in tensors.items()}
    each, experts = numels(stored, config), experts_in(stored, config, layer)
    routed = sum(n for name, n in each.items() if name.startswith(family.experts(layer)))
    others = sum(n for name, n in each.items() if len(stored.get(name, (1, 1))) > 1 and not name.startswith(family.experts(layer)))
    active = routed * family.experts_per_token(experts) / experts if experts else 0.0
    return 2 * (others + active)
