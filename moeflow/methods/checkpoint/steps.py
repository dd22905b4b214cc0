"""Read and write checkpoints: split one into a file per decoder layer and one for the rest, and assemble a folder from them.

Hub shards straddle layers, so a fine-tune of one layer would change several; layer files do not. Assembling lists blobs and moves
none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from moeflow import __version__
from moeflow.arch import Config, Family, essential, family_config, layer_of
from moeflow.methods.checkpoint import prediction, reading
from moeflow.methods.graph import INDEX, REST, Model, named_like
from moeflow.methods.records import Facts, decision, read_json
from moeflow.methods.rewrite import config_files, link_all, readable, write_config
from moeflow.model.asked import check_layer, check_rest
from moeflow.model.formats import config_of, format_of
from moeflow.model.header import TensorInfo
from moeflow.model.layout import ESSENTIAL, file_for, headers
from moeflow.model.packed import METHOD, Shapes, check_whole, quantization_config, scheme_of
from moeflow.model.spec import CheckpointSpec, LayerSpec, RestSpec, TensorTable, file_bytes, header_bytes, tensor_bytes
from moeflow.sources import Mtp, Source
from moeflow.sources.referred import opened
from moeflow.step import Artifact, Context, Spec, Step, step


def _assemble_spec(
    rest: RestSpec, layers: tuple[LayerSpec, ...], prediction_layers: tuple[LayerSpec, ...], choices: tuple[Any, ...],
    *, config: Config,
) -> Spec:  # fmt: skip
    prediction.check_beside(layers, prediction_layers)
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
    prediction.check_counts((f.experts for f in formats[: len(layers)]), (f.experts for f in formats[len(layers) :]))
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


TRAVELLING = (
    "tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model", "*.tiktoken", "*.jinja", "chat_template*",
    "generation_config.json", "licen[cs]e*", "copying*", "notice*", "use_policy*",
)  # fmt: skip
"""The files that every checkpoint keeps besides its weights and config.json, in lower or upper case."""
HISTORY = "moeflow.json"
"""The file of an assembled checkpoint that says what was decided, and what was done to each layer."""

Table = dict[str, list[Any]]
"""Tensor name to [index of the input, dtype, shape, first byte, last byte + 1]."""


def pinned(source: Source, *, mtp: Mtp | None = None) -> Model:
    """The checkpoint at a pinned source (a folder, a hub repository at a commit, an `s3://` prefix).

    Reads config.json, the index, the safetensors headers and the small files beside them, no weights. `mtp`: "drop" the
    multi-token-prediction layers, "keep" them unchanged, or "prune" them with the decoder layers; None: as the source says.

    Raises ValueError for an unknown family, a checkpoint packed in a way that moeflow does not read, a file that is damaged or says
    what cannot be, and tensors that are not exactly those that config.json asks for.
    """
    if (mtp := mtp or source.mtp) not in get_args(Mtp):
        raise ValueError(f"mtp={mtp!r}; choose 'drop', 'keep' or 'prune'")
    config = reading.config_of(source)
    family = Family.of(config)
    small = sorted(f.name for f in source.files if named_like(f.name, TRAVELLING))
    reading.check_small(source, small)
    of_mtp = prediction.settled(config, reading.tensors_of(source), mtp, source.uri)
    config, tensors = of_mtp.config, of_mtp.tensors
    reading.check_packing(tensors, config, source.uri)
    if (config.get("quantization_config") or {}).get("quant_method") == METHOD:  # written again for what is packed then
        config.pop("quantization_config")
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
        return layer(shards, history, config=essential(config), layer=i, tensors=table)

    shards, table = _inputs(by_layer.get(None, {}), steps)
    check_rest(config, {n: (t.dtype, t.shape) for n, t in by_layer.get(None, {}).items()})
    texts = source.group(small or ["config.json"])
    return Model(
        config=config,
        rest=rest(texts, shards, config=config, files=small, tensors=table, note=of_mtp.note),
        texts=texts,
        layers=tuple(layer_step(i) for i in range(count)),
        extra=tuple(layer_step(i) for i in of_mtp.layers),
        mtp=mtp,
    )


def _layer_spec(shards: tuple[Any, ...], history: Any, *, config: Config, layer: int, tensors: Table) -> Spec:
    table: TensorTable = {n: (dtype, tuple(shape)) for n, (_, dtype, shape, _, _) in tensors.items()}
    experts = format_of({n: shape for n, (_, shape) in table.items()}, config, layer).experts
    out = LayerSpec(config, layer, experts, table)
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
    for file in sorted({file_for(n) for n in tensors}):
        _gather(context, shards, {n: t for n, t in tensors.items() if file_for(n) == file}, context.out / file)
    for entry in read_json(history, HISTORY).get("layers", ()) if history else ():
        if entry["layer"] == layer:
            Facts(tuple(entry["done"])).write(context.out)


def _rest_spec(texts: Any, shards: tuple[Any, ...], *, config: Config, files: list[str], tensors: Table, note: str) -> Spec:
    table: TensorTable = {n: (dtype, tuple(shape)) for n, (_, dtype, shape, _, _) in tensors.items()}
    out = RestSpec(config, table, {n: texts["files"][n] for n in files})
    moved = sum(tensor_bytes(*t) for t in table.values())
    size = sum(map(len, config_files(config).values()))
    return Spec(out, reads=moved, writes=file_bytes(table) + size, memory=2 * moved, notes=(note,) if note else ())


@step("checkpoint.rest", version=1, spec=_rest_spec)
def rest(
    context: Context, texts: Artifact, shards: tuple[Artifact, ...], *, config: Config, files: list[str], tensors: Table, note: str
) -> None:
    """Write all but the decoder layers: `rest.safetensors`, config.json, and the small files that belong to the checkpoint."""
    _gather(context, shards, tensors, context.out / REST)
    write_config(config, context.out)
    if note:
        context.note(note)
    for name in files:
        context.link(texts, name)


def _gather(context: Context, shards: tuple[Artifact, ...], tensors: Table, path: Path) -> None:
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
            gathered[name] = tensor
            done += tensor.nbytes
            context.progress(done, total, "bytes")
    checkpoint.save(gathered, path)


def _inputs(tensors: dict[str, TensorInfo], steps: dict[str, Step]) -> tuple[tuple[Step, ...], Table]:
    """The shards that contain these tensors, and the place of each tensor."""
    shards = sorted({t.file for t in tensors.values()})
    table = {n: [shards.index(t.file), t.dtype, list(t.shape), t.start, t.stop] for n, t in sorted(tensors.items())}
    return tuple(steps[s] for s in shards), table
