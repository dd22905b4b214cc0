"""What a layer's file takes, counted from its header: bytes on disk, bytes in an engine's memory, operations of a token."""

from collections.abc import Mapping
from math import prod
from typing import Any

from moeflow.arch import EMBEDDING, HEAD, Config, Family
from moeflow.engines import Engine
from moeflow.model.buckets import buckets
from moeflow.model.formats import Format, format_of
from moeflow.model.header import TensorInfo
from moeflow.model.layout import experts_in, headers
from moeflow.model.packed import PACKED, numels
from moeflow.model.spec import LayerSpec, RestSpec, element_bytes, file_bytes
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


def expected(spec: Any, unit: str, engine: Engine) -> float:
    """The same of a layer, the rest or other tensors that are not made yet, as nearly as their specs tell it."""
    if unit == "operations":
        if isinstance(spec, RestSpec):
            return 2 * prod((spec.tensors.get(HEAD) or spec.tensors[EMBEDDING])[1])
        return 2 * spec.active if isinstance(spec, LayerSpec) else 0
    if isinstance(spec, RestSpec):
        return file_bytes(spec.tensors)
    if unit == "resident" and isinstance(spec, LayerSpec):
        return spec.loaded("auto") if engine.unpacks and spec.packed else spec.nbytes - spec.headers
    return float(spec.nbytes)


def _resident(tensors: Mapping[str, TensorInfo], engine: Engine, config: Config, layer: int | None) -> float:
    """The bytes in memory: unpacked where the engine unpacks, and ranks padded as `RoutedExperts` pads them."""
    stored, element = {n: t.shape for n, t in tensors.items()}, element_bytes(config, "auto")
    each = numels(stored, config)
    unpacked = engine.unpacks and any(n.endswith(PACKED) for n in stored)
    bytes_ = sum(each.values()) * element if unpacked else sum(t.nbytes for t in tensors.values())
    if layer is None:
        return bytes_
    return bytes_ + _padding(each, format_of(stored, config, layer), Family.of(config), layer) * element


def _padding(each: Mapping[str, int], format: Format, family: Family, layer: int) -> int:
    """How many zeros lie beside the factors of a layer's experts in memory."""
    padding = 0
    for matrices in (family.matrices[:-1], family.matrices[-1:]):
        low = [e for e, rank in enumerate(format.ranks(matrices[0])) if rank]
        if low:
            ranks = tuple(tuple(format.ranks(matrix)[e] for e in low) for matrix in matrices)
            name = family.expert(layer, low[0])[family.matrices.index(matrices[0])]
            both_sides = sum(each[factor] for factor in family.factors(name)) // ranks[0][0]
            padding += (buckets(ranks).rows - sum(map(sum, ranks))) * both_sides
    return padding


def _operations(tensors: Mapping[str, TensorInfo], config: Config, layer: int) -> float:
    """Two for each weight of each matrix that a token is multiplied with; attention over positions is left out."""
    family, stored = Family.of(config), {n: t.shape for n, t in tensors.items()}
    each, experts = numels(stored, config), experts_in(stored, config, layer)
    routed = sum(n for name, n in each.items() if name.startswith(family.experts(layer)))
    others = sum(n for name, n in each.items() if len(stored.get(name, (1, 1))) > 1 and not name.startswith(family.experts(layer)))
    active = routed * family.experts_per_token(experts) / experts if experts else 0.0
    return 2 * (others + active)
