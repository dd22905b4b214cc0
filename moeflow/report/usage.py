"""How much each expert of the original was used, by an engine's requests or while it was calibrated: read from what is stored."""

import json
import struct
from array import array
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from moeflow.step import Artifact
from moeflow.store import Manifest, NotStored, Store, StoreError
from moeflow.store.names import split_part

OBSERVE, TRAFFIC = "calibrate.observe", "data.traffic"
ORIGINAL = ("checkpoint.layer", "checkpoint.merged_layer", "checkpoint.rest", "checkpoint.merged_rest", "calibrate.")
"""The beginnings of the steps that a pass of the original reads."""
THREADS = 32
CODES = {"F64": "d", "F32": "f", "I64": "q"}


def of_experts(store: Store, lineage: Mapping[str, Manifest]) -> dict[int, tuple[float, ...]]:
    """By layer of the original, the part of its tokens that each expert computed; the parts of a layer add up to its top k.

    Layers of which nothing is stored any more are left out, as after `moeflow gc --keep-results`.
    """
    served = [m for m in lineage.values() if m.step == TRAFFIC]
    passes = served or [m for m in lineage.values() if m.step == OBSERVE and _of_original(m, lineage)]
    wanted = [(m.key, name) for m in passes for name in m.files if name.startswith("layer-")]
    with ThreadPoolExecutor(THREADS) as pool:
        read = [*pool.map(lambda at: _counts(store, *at), wanted)]
    sums: dict[int, list[float]] = {}
    tokens: dict[int, float] = {}
    for (_, name), counts in zip(wanted, read, strict=True):
        if counts is None:
            continue
        layer, (of_experts, seen) = int(name.removeprefix("layer-").partition(".")[0]), counts
        before = sums.get(layer, [0.0] * len(of_experts))
        sums[layer] = [a + b for a, b in zip(before, of_experts, strict=True)]
        tokens[layer] = tokens.get(layer, 0.0) + seen
    return {i: tuple(c / tokens[i] for c in counts) for i, counts in sorted(sums.items()) if tokens[i]}


def _of_original(manifest: Manifest, lineage: Mapping[str, Manifest]) -> bool:
    inputs = (lineage.get(split_part(i.key)[0]) for i in manifest.inputs)
    return all(m is not None and m.step.startswith(ORIGINAL) for m in inputs)


def _counts(store: Store, key: str, name: str) -> tuple[list[float], float] | None:
    """How many tokens each expert of a layer computed in one shard, and the tokens; None if that is not stored."""
    try:
        artifact = store.artifact(key)
        count, tokens = (tensor(artifact, name, tensor_name) for tensor_name in ("count_E", "tokens"))
    except (NotStored, StoreError, FileNotFoundError):
        return None
    return (count, tokens[0]) if count and tokens else None


def tensor(artifact: Artifact, file: str, name: str) -> list[float]:
    """The numbers of one small tensor of a safetensors file, read by its range; empty if there is no such tensor."""
    (length,) = struct.unpack("<Q", artifact.read(file, 0, 8))
    about = json.loads(bytes(artifact.read(file, 8, 8 + length))).get(name)
    if about is None or about["dtype"] not in CODES:
        return []
    start, stop = about["data_offsets"]
    values = array(CODES[about["dtype"]], artifact.read(file, 8 + length + start, 8 + length + stop))
    return [float(v) for v in values]
