"""What the steps that split a checkpoint are made of: what they need, and how tensors are gathered and an adapter is merged."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeflow.arch import Config
from moeflow.methods.checkpoint import intake
from moeflow.methods.checkpoint.adapter import Addition
from moeflow.methods.records import Facts, read_json
from moeflow.methods.rewrite import config_files
from moeflow.model.formats import format_of
from moeflow.model.header import TensorInfo
from moeflow.model.layout import LAYER, ROUTING, Folder, file_for, headers
from moeflow.model.spec import LayerSpec, RestSpec, TensorTable, file_bytes, tensor_bytes
from moeflow.model_files import HISTORY
from moeflow.step import Artifact, Context, Spec

if TYPE_CHECKING:
    from torch import Tensor

Change = Callable[[str, "Tensor"], "Tensor"]
"""What is made of a tensor, by its name and itself."""
Table = dict[str, list[Any]]
"""Tensor name to [index of the input, dtype, shape, first byte, last byte + 1], and an `intake.View` if the bytes need one."""


def layer_spec(shards: tuple[Any, ...], history: Any, *, config: Config, layer: int, tensors: Table) -> Spec:
    table = _entries(tensors)
    experts = format_of({n: shape for n, (_, shape) in table.items()}, config, layer).experts
    stays = all(shard.get("elsewhere") for shard in shards) and all(map(intake.is_plain, _of_layer(tensors).values()))
    out = LayerSpec(config, layer, experts, table, elsewhere=stays)
    moved = intake.bytes_read(tensors)
    return Spec(out, reads=moved, writes=_note_bytes(out, tensors) if stays else out.nbytes, memory=2 * moved)


def merged_layer_spec(
    shards: tuple[Any, ...], adapter: Any, history: Any, *, config: Config, layer: int, tensors: Table,
    additions: Mapping[str, Addition], moved: int,
) -> Spec:  # fmt: skip
    plain = layer_spec(shards, history, config=config, layer=layer, tensors=tensors)
    largest = max(tensor_bytes("F32", tuple(tensors[name][2])) for name in additions)
    out = replace(plain.output, elsewhere=False)
    return replace(plain, output=out, writes=out.nbytes, reads=plain.reads + moved, memory=plain.memory + 2 * moved + 3 * largest)


def rest_spec(
    texts: Any, shards: tuple[Any, ...], code: Any = None, *, config: Config, files: list[str], tensors: Table, note: str
) -> Spec:
    table = _entries(tensors)
    out = RestSpec(config, table, {n: texts["files"][n] for n in files} | (code["files"] if code else {}))
    moved = sum(tensor_bytes(*t) for t in table.values())
    size = sum(map(len, config_files(config).values()))
    return Spec(out, reads=moved, writes=file_bytes(table) + size, memory=2 * moved, notes=(note,) if note else ())


def merged_rest_spec(before: RestSpec, adapter: Any, *, additions: Mapping[str, Addition], moved: int) -> Spec:
    size = file_bytes(before.tensors)
    return Spec(before, reads=size + moved, writes=size, memory=2 * moved + 5 * size)


def beside_spec(shards: tuple[Any, ...], *, tensors: Table) -> Spec:
    table = _entries(tensors)
    size = sum(tensor_bytes(*t) for t in table.values())
    return Spec(RestSpec({}, table, {}), reads=size, writes=file_bytes(table), memory=2 * size)


def _note_bytes(layer: LayerSpec, tensors: Table) -> int:
    """About the size of the note of a layer's file (`moeflow.sources.elsewhere`): its header, and the pieces of the rest."""
    places = [(at, start, stop) for _, (at, _, _, start, stop) in sorted(_of_layer(tensors).items())]
    pieces = 1 + sum(one[::2] != other[:2] for one, other in pairwise(places))
    return 4 * layer.headers // 3 + 50 * pieces + 150


def own_spec(before: LayerSpec) -> Spec:
    expected = 0 if before.changed else before.nbytes
    return Spec(replace(before, elsewhere=False), reads=expected, writes=expected, memory=1 << 28)


def gather_layer(context: Context, shards: tuple[Artifact, ...], tensors: Table, change: Change | None = None) -> None:
    """Write a layer's files. Where the shards are referred to, and hold every tensor as it is here, a note takes the place of the
    layer's weights, which are read once all the same: to be checked, and for their digest."""
    from moeflow.sources import elsewhere, referred

    layer = _of_layer(tensors)
    if beside := {n: t for n, t in tensors.items() if n not in layer}:
        gather(context, shards, beside, context.out / ROUTING, change)
    if not layer:
        return
    if change or not all(map(referred.is_reference, shards)) or not all(map(intake.is_plain, layer.values())):
        gather(context, shards, layer, context.out / LAYER, change)
        return
    path, names = context.scratch / LAYER, [referred.opened(s, context).names()[0] for s in shards]
    gather(context, shards, layer, path)
    lies = sorted(headers(Folder(context.scratch)).items(), key=lambda t: t[1].start)
    pieces = [(at, names[at], start, stop) for at, _, _, start, stop in (layer[n] for n, _ in lies)]
    file = elsewhere.Elsewhere.of(path, lies[0][1].start, pieces)
    elsewhere.written(file, context.out, LAYER)
    context.stands_for = {**context.stands_for, LAYER: file.sha256}


def gather(
    context: Context, shards: tuple[Artifact, ...], tensors: Table, path: Path,
    change: Change | None = None, *, finite: bool = True,
) -> None:  # fmt: skip
    """Write these tensors of the shards into one file, each as it is, or as `change` makes it of its name and itself.

    Raises ValueError if one must be `finite` and is not.
    """
    from moeflow.model import checkpoint
    from moeflow.sources.referred import opened

    gathered, done, total = {}, 0, intake.bytes_read(tensors)
    for at, shard in enumerate(shards):
        files = opened(shard, context)
        (file,) = (n for n in files.names() if n.endswith(".safetensors"))
        sharing: dict[TensorInfo, list[str]] = {}  # the tensors of each range of bytes
        for name, entry in tensors.items():
            if entry[0] == at:
                sharing.setdefault(intake.place(file, entry), []).append(name)
        for first, tensor in checkpoint.read_many(files, {names[0]: info for info, names in sharing.items()}):
            if finite and not checkpoint.is_finite(first, tensor):
                raise ValueError(f"{first} holds NaN or infinite weights; the checkpoint is damaged, fetch or train it again")
            for name in sharing[intake.place(file, tensors[first])]:
                view = intake.view_of(tensor, tensors[name])
                gathered[name] = change(name, view) if change else view
            done += tensor.nbytes
            context.progress(done, total, "bytes")
    checkpoint.save(gathered, path)


def merging(context: Context, adapter: Artifact, additions: Mapping[str, Addition]) -> Change:
    """What turns a tensor, by its name, into the merged one. A factor of the adapter is read once."""
    from moeflow.methods.checkpoint.merging import merged
    from moeflow.model.checkpoint import Tensors
    from moeflow.sources.referred import opened

    read = cache(Tensors(opened(adapter, context)).__getitem__)
    return lambda name, tensor: merged(name, tensor, additions[name], read) if name in additions else tensor


def done_before(history: Artifact | None, layer: int) -> Facts | None:
    """What the `moeflow.json` of a checkpoint says was done to a layer before."""
    entries = read_json(history, HISTORY).get("layers", ()) if history else ()
    return next((Facts(tuple(e["done"])) for e in entries if e["layer"] == layer), None)


def _of_layer(tensors: Table) -> Table:
    return {n: entry for n, entry in tensors.items() if file_for(n) == LAYER}


def _entries(tensors: Table) -> TensorTable:
    return {n: (entry[1], tuple(entry[2])) for n, entry in tensors.items()}
