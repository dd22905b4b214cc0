"""Read and write checkpoints: split one into a file per decoder layer and one for the rest, and assemble a folder from them.

Hub shards straddle layers, so a fine-tune of one layer would change several; layer files do not. Assembling lists blobs and moves
none.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moeflow import __version__
from moeflow.arch import Config, Family, essential, family_config, layer_of
from moeflow.methods.checkpoint import adapter as adapters
from moeflow.methods.checkpoint import foreign, reading, remote_code
from moeflow.methods.checkpoint.adapter import Addition
from moeflow.methods.graph import REST, Model
from moeflow.methods.records import Facts, decision, read_json
from moeflow.methods.rewrite import config_files, link_all, readable, write_config
from moeflow.model.asked import check_layer, check_rest
from moeflow.model.formats import config_of, format_of
from moeflow.model.header import TensorInfo
from moeflow.model.layout import ESSENTIAL, file_for, headers
from moeflow.model.packed import METHOD, Shapes, check_whole, quantization_config, scheme_of
from moeflow.model.spec import CheckpointSpec, LayerSpec, RestSpec, TensorTable, file_bytes, header_bytes, tensor_bytes
from moeflow.model_files import HISTORY, INDEX, TRAVELLING, named_like
from moeflow.sources import Source
from moeflow.sources.referred import opened
from moeflow.step import Artifact, Context, Spec, Step, step

if TYPE_CHECKING:
    from torch import Tensor

Change = Callable[[str, "Tensor"], "Tensor"]
"""What is made of a tensor, by its name and itself."""


def _assemble_spec(
    rest: RestSpec, layers: tuple[LayerSpec, ...], prediction_layers: tuple[LayerSpec, ...], choices: tuple[Any, ...],
    *, config: Config,
) -> Spec:  # fmt: skip
    layers += prediction_layers
    tables = [layer.tensors for layer in layers] + [rest.tensors]
    _packing([{n: shape for n, (_, shape) in table.items()} for table in tables], [layer.experts for layer in layers], config)
    headers = sum(layer.headers for layer in layers) + header_bytes(rest.tensors)
    names = sum(len(n) + 44 for table in tables for n in table)
    weights = sum(layer.nbytes for layer in layers) + file_bytes(rest.tensors)
    parameters = sum(layer.numel for layer in layers) + LayerSpec(config, -1, 0, rest.tensors).numel
    out = CheckpointSpec(config, weights, parameters, headers, sum(rest.files.values()) + names + 3000)
    return Spec(out, reads=headers, writes=names + 3000, memory=1 << 24)


@step("checkpoint.assemble", version=1, spec=_assemble_spec)
def assemble(
    context: Context, rest: Artifact, layers: tuple[Artifact, ...], prediction_layers: tuple[Artifact, ...] = (),
    choices: tuple[Artifact, ...] = (), *, config: Config,
) -> None:  # fmt: skip
    """Write a checkpoint folder: layer files, index, config.json, and the small files that belong to it.

    It has the family's own format if all layers keep the same number of experts and every matrix is whole; otherwise moeflow's,
    which `moeflow.model.compressed` loads. `layers`: the decoder's, in order; `prediction_layers`: those behind them; `choices`:
    the decisions that led here. `moeflow.json` has these, and what was done to each layer, in order. No weight is read or written:
    the folder lists the layers' existing blobs.
    """
    every = (*layers, *prediction_layers)
    tables = [headers(artifact) for artifact in (*every, rest)]
    formats = [format_of({n: t.shape for n, t in table.items()}, config, i) for i, table in enumerate(tables[:-1])]
    files = [
        (artifact, name, {n: t for n, t in table.items() if t.file == name})
        for artifact, table in zip((*every, rest), tables, strict=True)
        for name in artifact.names()
        if name.endswith(".safetensors")
    ]
    weight_map: dict[str, str] = {}
    total = 0
    for i, (artifact, name, tensors) in enumerate(files):
        target = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        context.link(artifact, name, target)
        weight_map |= dict.fromkeys(tensors, target)
        total += sum(t.nbytes for t in tensors.values())
    (context.out / INDEX).write_text(readable({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}))
    decoder = [f if f.experts or f.gone else None for f in formats[: len(layers)]]
    packing = _packing([{n: t.shape for n, t in table.items()} for table in tables], [f.experts for f in formats], config)
    (context.out / "config.json").write_text(readable(config_of(family_config(config), decoder) | packing))
    link_all(context, rest, but=(REST, ESSENTIAL, "config.json"))
    done = [{"layer": i, "done": facts.done} for i, facts in enumerate(map(Facts.of, every)) if facts.done]
    history = {"moeflow": __version__, "choices": [decision(c) for c in choices], "layers": done}
    (context.out / HISTORY).write_text(readable(history))


def _packing(tables: Sequence[Shapes], experts: Sequence[int], config: Config) -> dict[str, Any]:
    """The entries of config.json that describe packed matrices; empty if there are none."""
    for layer, (table, count) in enumerate(zip(tables, experts, strict=False)):
        check_whole(table, layer, config, count)
    shapes = {n: shape for table in tables for n, shape in table.items()}
    scheme = scheme_of(shapes, config)
    return {"quantization_config": quantization_config(scheme, shapes, config)} if scheme else {}


def checkpoint_of(model: Model) -> Step:
    """The whole checkpoint as one artifact."""
    return assemble(model.rest, model.layers, model.extra, model.choices, config=model.config)


Table = dict[str, list[Any]]
"""Tensor name to [index of the input, dtype, shape, first byte, last byte + 1]."""


def pinned(source: Source, *, mtp: Literal["drop", "keep"] = "drop") -> Model:
    """The checkpoint at a pinned source (a folder, a hub repository at a commit, an `s3://` prefix).

    Reads config.json, the index, the safetensors headers and the small files beside them, no weights. `mtp`: "drop" the
    multi-token-prediction layers of DeepSeek-V3, which are behind the decoder layers, or "keep" them unchanged.

    Raises ValueError for an unknown family, a checkpoint packed in a way that moeflow does not read, a file that is damaged or says
    what cannot be, and tensors that are not exactly those that config.json asks for.
    """
    if mtp not in ("drop", "keep"):
        raise ValueError(f"mtp={mtp!r}; choose 'drop' or 'keep'")
    adapters.check(source)
    config = reading.config_of(source)
    family = Family.of(config)
    small = sorted(f.name for f in source.files if named_like(f.name, TRAVELLING) and not f.name.endswith(".py"))
    configs = reading.small_configs(source, small) | {"config.json": config}
    code = remote_code.code_of(source, configs)
    tensors, ignored = foreign.without_buffers(reading.tensors_of(source, config))
    reading.check_packing(tensors, config, source.uri)
    if (config.get("quantization_config") or {}).get("quant_method") == METHOD:  # written again for what is packed then
        config.pop("quantization_config")
    merge = adapters.merge_of(source.adapter, config, tensors) if source.adapter else None
    steps = {name: source.weights(name) for name in sorted({t.file for t in tensors.values()})}
    count = family.num_layers
    by_layer: dict[int | None, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        by_layer.setdefault(layer_of(name), {})[name] = info
    if missing := sorted(set(range(count)) - set(by_layer)):
        raise ValueError(f"config.json says {count} layers, but the checkpoint has no tensor of layer {missing[0]}")

    history = source.file(HISTORY) if HISTORY in source.names() else None

    def layer_step(i: int) -> Step:
        shards, table = _inputs(by_layer[i], steps)
        if i < count:
            check_layer(config, i, {n: (t.dtype, t.shape) for n, t in by_layer[i].items()})
        if merge and (additions := merge.of(by_layer[i])):
            return merged_layer(
                shards, merge.step(), history,
                config=essential(config), layer=i, tensors=table, additions=additions, moved=merge.moved(additions),
            )  # fmt: skip
        return layer(shards, history, config=essential(config), layer=i, tensors=table)

    behind = sorted(i for i in by_layer if i is not None and i >= count)
    if behind[int(config.get("num_nextn_predict_layers") or 0) :]:
        raise ValueError(f"the checkpoint has tensors of layer {behind[-1]}, but config.json says {count} layers")
    shards, table = _inputs(by_layer.get(None, {}), steps)
    check_rest(config, {n: (t.dtype, t.shape) for n, t in by_layer.get(None, {}).items()})
    texts = source.group(small or ["config.json"])
    note = ""
    if mtp == "drop" and behind:
        note = f"multi-token-prediction layers {behind} are dropped (mtp='keep' keeps them as they are)"
    if mtp == "drop" and "num_nextn_predict_layers" in config:
        config = config | {"num_nextn_predict_layers": 0}
    others = rest(texts, shards, source.group(code) if code else None, config=config, files=small, tensors=table, note=note)
    if merge and (additions := merge.of(table)):
        others = merged_rest(others, merge.step(), additions=additions, moved=merge.moved(additions))
    left = foreign.note_of_left(source, (*small, *code, *steps))
    return Model(
        config=config,
        rest=others.noting(*(n for n in (ignored, left, merge.note() if merge else "") if n)),
        texts=texts,
        layers=tuple(layer_step(i) for i in range(count)),
        extra=tuple(layer_step(i) for i in behind) if mtp == "keep" else (),
        tokenizer_code=remote_code.tokenizer_code(configs.get("tokenizer_config.json", {}), small),
    )


def _layer_spec(shards: tuple[Any, ...], history: Any, *, config: Config, layer: int, tensors: Table) -> Spec:
    table: TensorTable = {n: (dtype, tuple(shape)) for n, (_, dtype, shape, _, _) in tensors.items()}
    behind = layer >= int(config["num_hidden_layers"])  # a prediction layer is kept as it is, whatever it holds
    experts = format_of({n: shape for n, (_, shape) in table.items()}, config, layer).experts
    out = LayerSpec(config, layer, 0 if behind else experts, table)
    moved = sum(tensor_bytes(*t) for t in table.values())
    return Spec(out, reads=moved, writes=out.nbytes, memory=2 * moved)


@step("checkpoint.layer", version=1, spec=_layer_spec)
def layer(
    context: Context, shards: tuple[Artifact, ...], history: Artifact | None = None, *, config: Config, layer: int, tensors: Table
) -> None:
    """Write one decoder layer: `layer.safetensors`, under the hub's names, and what routing adds to it: `routing.safetensors`.

    `history`: the `moeflow.json` of a checkpoint that moeflow wrote; the layer's facts begin with what it says of this layer.
    Raises ValueError if a weight is NaN or infinite.
    """
    _gather_layer(context, shards, tensors)
    if done := _done(history, layer):
        done.write(context.out)


def _merged_layer_spec(
    shards: tuple[Any, ...], adapter: Any, history: Any, *, config: Config, layer: int, tensors: Table,
    additions: Mapping[str, Addition], moved: int,
) -> Spec:  # fmt: skip
    plain = _layer_spec(shards, history, config=config, layer=layer, tensors=tensors)
    largest = max(tensor_bytes("F32", tuple(tensors[name][2])) for name in additions)
    return replace(plain, reads=plain.reads + moved, memory=plain.memory + 2 * moved + 3 * largest)


@step("checkpoint.merged_layer", version=1, spec=_merged_layer_spec)
def merged_layer(
    context: Context, shards: tuple[Artifact, ...], adapter: Artifact, history: Artifact | None = None,
    *, config: Config, layer: int, tensors: Table, additions: Mapping[str, Addition], moved: int,
) -> None:  # fmt: skip
    """Write one decoder layer as `checkpoint.layer` does, with an adapter merged into its weights.

    `additions`: what the adapter makes of the tensors that it changes; `moved`: the bytes that are read of it. Raises ValueError
    also if a merged weight is NaN or infinite.
    """
    _gather_layer(context, shards, tensors, _merging(context, adapter, additions))
    scales = sorted({a.scale for a in additions.values() if a.a})
    (_done(history, layer) or Facts()).and_then("checkpoint.merged_layer", tensors=len(additions), scales=scales).write(context.out)


def _merged_rest_spec(before: RestSpec, adapter: Any, *, additions: Mapping[str, Addition], moved: int) -> Spec:
    size = file_bytes(before.tensors)
    return Spec(before, reads=size + moved, writes=size, memory=2 * moved + 5 * size)


@step("checkpoint.merged_rest", version=1, spec=_merged_rest_spec)
def merged_rest(context: Context, before: Artifact, adapter: Artifact, *, additions: Mapping[str, Addition], moved: int) -> None:
    """What is not of a decoder layer, with an adapter merged into embedding, final norm or head; see `merged_layer`."""
    from moeflow.model.checkpoint import Tensors, save

    change = _merging(context, adapter, additions)
    save({name: change(name, tensor) for name, tensor in Tensors(before).items()}, context.out / REST)
    link_all(context, before, but=(REST,))


def _merging(context: Context, adapter: Artifact, additions: Mapping[str, Addition]) -> Change:
    """What turns a tensor, by its name, into the merged one. A factor of the adapter is read once."""
    from moeflow.methods.checkpoint.merging import merged
    from moeflow.model.checkpoint import Tensors

    read = cache(Tensors(opened(adapter, context)).__getitem__)
    return lambda name, tensor: merged(name, tensor, additions[name], read) if name in additions else tensor


def _done(history: Artifact | None, layer: int) -> Facts | None:
    """What the `moeflow.json` of a checkpoint says was done to a layer before."""
    entries = read_json(history, HISTORY).get("layers", ()) if history else ()
    return next((Facts(tuple(e["done"])) for e in entries if e["layer"] == layer), None)


def _rest_spec(
    texts: Any, shards: tuple[Any, ...], code: Any = None, *, config: Config, files: list[str], tensors: Table, note: str
) -> Spec:
    table: TensorTable = {n: (dtype, tuple(shape)) for n, (_, dtype, shape, _, _) in tensors.items()}
    out = RestSpec(config, table, {n: texts["files"][n] for n in files} | (code["files"] if code else {}))
    moved = sum(tensor_bytes(*t) for t in table.values())
    size = sum(map(len, config_files(config).values()))
    return Spec(out, reads=moved, writes=file_bytes(table) + size, memory=2 * moved, notes=(note,) if note else ())


@step("checkpoint.rest", version=1, spec=_rest_spec)
def rest(
    context: Context, texts: Artifact, shards: tuple[Artifact, ...], code: Artifact | None = None,
    *, config: Config, files: list[str], tensors: Table, note: str,
) -> None:  # fmt: skip
    """Write all but the decoder layers: `rest.safetensors`, config.json, and the small files that belong to the checkpoint.

    `code`: the Python files of classes of its own, which nobody runs here.
    """
    _gather(context, shards, tensors, context.out / REST)
    write_config(config, context.out)
    if note:
        context.note(note)
    for name in files:
        context.link(texts, name)
    if code:
        link_all(context, code)


def _gather_layer(context: Context, shards: tuple[Artifact, ...], tensors: Table, change: Change | None = None) -> None:
    for file in sorted({file_for(n) for n in tensors}):
        _gather(context, shards, {n: t for n, t in tensors.items() if file_for(n) == file}, context.out / file, change)


def _gather(context: Context, shards: tuple[Artifact, ...], tensors: Table, path: Path, change: Change | None = None) -> None:
    """Write a file with these tensors, each as it is, or as `change` makes it of its name and itself."""
    from moeflow.model import checkpoint

    gathered, done = {}, 0
    total = sum(stop - start for _, _, _, start, stop in tensors.values())
    for at, shard in enumerate(shards):
        files = opened(shard, context)
        (file,) = (n for n in files.names() if n.endswith(".safetensors"))
        here = {n: TensorInfo(file, t[1], tuple(t[2]), t[3], t[4]) for n, t in tensors.items() if t[0] == at}
        for name, tensor in checkpoint.read_many(files, here):
            # FP8 has no infinity, and torch cannot check it for NaN
            if tensor.is_floating_point() and not (tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all():
                raise ValueError(f"{name} holds NaN or infinite weights; the checkpoint is damaged, fetch or train it again")
            gathered[name] = change(name, tensor) if change else tensor
            done += tensor.nbytes
            context.progress(done, total, "bytes")
    checkpoint.save(gathered, path)


def _inputs(tensors: dict[str, TensorInfo], steps: dict[str, Step]) -> tuple[tuple[Step, ...], Table]:
    """The shards that contain these tensors, and the place of each tensor."""
    shards = sorted({t.file for t in tensors.values()})
    table = {n: [shards.index(t.file), t.dtype, list(t.shape), t.start, t.stop] for n, t in sorted(tensors.items())}
    return tuple(steps[s] for s in shards), table
