"""Read and write checkpoints: split one into a file per decoder layer and one for the rest, and assemble a folder from them.

Hub shards straddle layers, so a fine-tune of one layer would change several; layer files do not. Assembling lists blobs and moves
none.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, get_args

from moeflow import __version__
from moeflow.arch import ARCH, Config, Family, Layout, essential, family_config, layer_of
from moeflow.arch.found import Found
from moeflow.methods.checkpoint import export, intake, prediction, reading
from moeflow.methods.graph import INDEX, REST, Form, Model, named_like
from moeflow.methods.records import Facts, decision, read_json
from moeflow.methods.rewrite import config_files, link_all, readable, write_config
from moeflow.model.asked import check_layer, check_rest
from moeflow.model.formats import config_of, format_of
from moeflow.model.header import TensorInfo
from moeflow.model.layout import ESSENTIAL, LAYER, file_for, headers
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
    _link_weights(context, (*every, rest))
    (context.out / "config.json").write_text(readable(_config_json(every, rest, config, len(layers))))
    link_all(context, rest, but=(REST, ESSENTIAL, "config.json"))
    _write_history(context, every, choices)


def _assemble_as_spec(
    rest: RestSpec, layers: tuple[LayerSpec, ...], files: tuple[Any, ...] = (), beside: Any = None, choices: tuple[Any, ...] = (),
    *, config: Config, form: Mapping[str, Any],
) -> Spec:  # fmt: skip
    count = int(config["num_hidden_layers"])
    plain: CheckpointSpec = _assemble_spec(rest, layers[:count], layers[count:], choices, config=config).output
    more = [f for f in files if isinstance(f, LayerSpec)] or list(layers)
    others: TensorTable = {} if beside is None else beside.tensors
    headers = sum(f.headers for f in more) + header_bytes(rest.tensors) + header_bytes(others)
    weights = sum(f.nbytes for f in more) + file_bytes(rest.tensors) + file_bytes(others)
    parameters = plain.parameters + sum(prod(shape) for _, shape in others.values())
    written = plain.others - sum(rest.files.values()) + len(form["whole"]) + sum(len(n) + 44 for n in others)
    out = CheckpointSpec(config, weights, parameters, headers, written + sum(rest.files.values()))
    return Spec(out, reads=headers, writes=written, memory=1 << 24, notes=(form["note"],) if form["note"] else ())


@step("checkpoint.assemble_as", version=1, spec=_assemble_as_spec)
def assemble_as(
    context: Context, rest: Artifact, layers: tuple[Artifact, ...], files: tuple[Artifact, ...] = (),
    beside: Artifact | None = None, choices: tuple[Artifact, ...] = (), *, config: Config, form: dict[str, Any],
) -> None:  # fmt: skip
    """As `assemble`, for a checkpoint whose form on disk is not that of the layer files.

    `files`: the layers, and then the rest, as they are to be on disk; `layers`: the same as moeflow works on them, the decoder's
    and then the prediction layers; `beside`: the tensors of a multimodal model beside its text model. `form`: "whole", the text of
    the source's config.json, of which the result's is to be made, if it is; "layout"; "own", whether the result has moeflow's
    format in any case; "note", for people.
    """
    layout = Layout.from_json(form["layout"])
    _link_weights(context, (*(files or (*layers, rest)), *([] if beside is None else [beside])))
    text = _config_json(layers, rest, config, int(config["num_hidden_layers"]), own=form["own"])
    whole = export.result(text, json.loads(form["whole"]), layout) if form["whole"] else text
    (context.out / "config.json").write_text(readable(export.without_arch(whole)))
    processors = () if form["whole"] else tuple(n for n in rest.names() if named_like(n, export.PROCESSORS))
    link_all(context, rest, but=(REST, ESSENTIAL, "config.json", *processors))
    _write_history(context, layers, choices)
    if form["note"]:
        context.note(form["note"])


def _link_weights(context: Context, artifacts: Sequence[Artifact]) -> None:
    """Link the safetensors files of these artifacts into the checkpoint, and write its index."""
    tables = [headers(artifact) for artifact in artifacts]
    files = [
        (artifact, name, {n: t for n, t in table.items() if t.file == name})
        for artifact, table in zip(artifacts, tables, strict=True)
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


def _config_json(every: Sequence[Artifact], rest: Artifact, config: Config, decoder: int, *, own: bool = False) -> Config:
    """The config.json of the text model with these layers, of which the first `decoder` are decoder layers."""
    tables = [{n: t.shape for n, t in headers(artifact).items()} for artifact in (*every, rest)]
    formats = [format_of(table, config, i) for i, table in enumerate(tables[:-1])]
    prediction.check_counts((f.experts for f in formats[:decoder]), (f.experts for f in formats[decoder:]))
    packing = _packing(tables, [f.experts for f in formats], config)
    kept = [f if f.experts or f.gone else None for f in formats[:decoder]]
    return config_of(family_config(config), kept, own=own) | packing


def _write_history(context: Context, every: Sequence[Artifact], choices: Sequence[Artifact]) -> None:
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
    """The whole checkpoint as one artifact, in the form of its source as far as the model still fits into it."""
    if model.form is None:
        return counted(model)
    return _assembled_as(model, export.written(model, model.form), model.form)


def text_model_of(model: Model) -> Step:
    """A checkpoint of the text model alone, which transformers loads as a causal language model."""
    if model.form is None:
        return counted(model)
    as_whole = export.written(model, model.form)
    if not as_whole.layout.inside:
        return _assembled_as(model, as_whole, model.form)
    return _assembled_as(model, replace(as_whole, layout=as_whole.layout.without_wrapper(), as_source=False), model.form)


def counted(model: Model) -> Step:
    """The same weights under the names that moeflow works on, for what counts them by name; transformers may not load it."""
    return assemble(model.rest, model.layers, model.extra, model.choices, config=model.config)


def _assembled_as(model: Model, as_: export.Written, form: Form) -> Step:
    every, layout = (*model.layers, *model.extra), as_.layout
    files: tuple[Step, ...] = ()
    if layout.renamed or layout.stacked:
        said = replace(layout, beside=(), inside=(), per_expert=False).to_json()
        files = (*(written(file, at=i, layout=said) for i, file in enumerate(every)), written(model.rest, at=None, layout=said))
    whole = json.dumps(form.whole) if as_.as_source else ""  # a text, because values lose the order of their keys
    told = {"whole": whole, "layout": layout.to_json(), "own": as_.own, "note": as_.note}
    beside = form.beside if as_.as_source else None
    return assemble_as(model.rest, every, files, beside, model.choices, config=model.config, form=told)


def _written_spec(before: LayerSpec | RestSpec, *, at: int | None, layout: Mapping[str, Any]) -> Spec:
    tensors = export.table(before.tensors, Layout.from_json(layout), at)
    out = replace(before, tensors=tensors) if isinstance(before, LayerSpec) else before
    size = file_bytes(tensors)
    return Spec(out, reads=file_bytes(before.tensors), writes=size, memory=3 * size)


@step("checkpoint.written", version=1, spec=_written_spec)
def written(context: Context, before: Artifact, *, at: int | None, layout: dict[str, Any]) -> None:
    """One layer's file, or that of the rest (`at` is none), under the names and in the stacks of a `Layout`."""
    export.write(before, headers(before), Layout.from_json(layout), at, context.out / (REST if at is None else LAYER))


TRAVELLING = (
    "tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model", "*.tiktoken", "*.jinja", "chat_template*",
    "generation_config.json", "licen[cs]e*", "copying*", "notice*", "use_policy*", *export.PROCESSORS,
)  # fmt: skip
"""The files that every checkpoint keeps besides its weights and config.json, in lower or upper case."""
HISTORY = "moeflow.json"
"""The file of an assembled checkpoint that says what was decided, and what was done to each layer."""

Table = dict[str, list[Any]]
"""Tensor name to [index of the input, dtype, shape, first byte, last byte + 1], and an `intake.View` if the bytes need one."""


def pinned(source: Source, *, mtp: Mtp | None = None, found: Found | None = None) -> Model:
    """The checkpoint at a pinned source (a folder, a hub repository at a commit, an `s3://` prefix).

    Reads config.json, the index, the safetensors headers and the small files beside them, no weights. `mtp`: "drop" the
    multi-token-prediction layers, "keep" them unchanged, or "prune" them with the decoder layers; None: as the source says.
    `found`: what is known of the checkpoint if no constant describes its family, or its tensors are not named as the family's own.

    Raises ValueError for an unknown family, a checkpoint packed in a way that moeflow does not read, a file that is damaged or says
    what cannot be, and tensors that are not exactly those that config.json asks for.
    """
    if (mtp := mtp or source.mtp) not in get_args(Mtp):
        raise ValueError(f"mtp={mtp!r}; choose 'drop', 'keep' or 'prune'")
    stored = reading.tensors_of(source)
    found = found or reading.looked_at(source, stored)
    whole, config = reading.config_of(source, found)
    family = Family.of(config)
    small = sorted(f.name for f in source.files if named_like(f.name, TRAVELLING))
    reading.check_small(source, small)
    layout = intake.layout_of(stored, family, found, source.uri)
    of_mtp = prediction.settled(config, intake.pieces(stored, layout, family, source.uri), mtp, source.uri)
    config, tensors = of_mtp.config, of_mtp.tensors
    reading.check_packing(tensors, config, source.uri)
    outside = {n: t for n, t in stored.items() if layout.beside and n.startswith(layout.beside)}
    if (config.get("quantization_config") or {}).get("quant_method") == METHOD:  # written again for what is packed then
        config = {k: v for k, v in config.items() if k != "quantization_config"}  # `whole`, which it may be, keeps it
    steps = {name: source.weights(name) for name in sorted({t.file for t in stored.values()})}
    count = family.num_layers
    by_layer: dict[int | None, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        by_layer.setdefault(layer_of(name), {})[name] = info
    if missing := sorted(set(range(count)) - set(by_layer)):
        raise ValueError(f"config.json says {count} layers, but the checkpoint has no tensor of layer {missing[0]}")

    history = source.file(HISTORY) if HISTORY in source.names() else None
    shapes = None if found is None else found.shapes

    def layer_step(i: int) -> Step:
        shards, table = _inputs(by_layer[i], steps)
        if i < count:
            check_layer(config, i, {n: (t.dtype, t.shape) for n, t in by_layer[i].items()}, shapes)
        return layer(shards, history, config=essential(config), layer=i, tensors=table)

    shards, table = _inputs(by_layer.get(None, {}), steps)
    check_rest(config, {n: (t.dtype, t.shape) for n, t in by_layer.get(None, {}).items()}, shapes)
    texts = source.group(small or ["config.json"])
    return Model(
        config=config,
        rest=rest(texts, shards, config=config, files=small, tensors=table, note=of_mtp.note),
        texts=texts,
        layers=tuple(layer_step(i) for i in range(count)),
        extra=tuple(layer_step(i) for i in of_mtp.layers),
        form=_form(whole, config, intake.wanted(layout, source.layout, family), outside, steps),
        mtp=mtp,
    )


def _form(whole: Config, config: Config, layout: Layout, outside: dict[str, TensorInfo], steps: dict[str, Step]) -> Form | None:
    """How a result is written, if not as the layer files are; `outside`: the tensors beside the text model."""
    if layout == Layout(per_expert=layout.per_expert) and ARCH not in config:
        return None
    if not outside:
        return Form(whole, layout)
    shards, table = _inputs(outside, steps)
    return Form(whole, layout, beside(shards, tensors=table))


def _beside_spec(shards: tuple[Any, ...], *, tensors: Table) -> Spec:
    table = _entries(tensors)
    size = sum(tensor_bytes(*t) for t in table.values())
    return Spec(RestSpec({}, table, {}), reads=size, writes=file_bytes(table), memory=2 * size)


@step("checkpoint.beside", version=1, spec=_beside_spec)
def beside(context: Context, shards: tuple[Artifact, ...], *, tensors: Table) -> None:
    """The tensors of a multimodal model beside its text model, such as the vision tower's, bit for bit and under their names."""
    _gather(context, shards, tensors, context.out / export.BESIDE, finite=False)


def _layer_spec(shards: tuple[Any, ...], history: Any, *, config: Config, layer: int, tensors: Table) -> Spec:
    table = _entries(tensors)
    experts = format_of({n: shape for n, (_, shape) in table.items()}, config, layer).experts
    out = LayerSpec(config, layer, experts, table)
    moved = intake.bytes_read(tensors)
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
    table = _entries(tensors)
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


def _gather(context: Context, shards: tuple[Artifact, ...], tensors: Table, path: Path, *, finite: bool = True) -> None:
    """Write these tensors of the shards into one file. Raises ValueError if one must be `finite` and is not."""
    from moeflow.model import checkpoint

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
                gathered[name] = intake.view_of(tensor, tensors[name])
            done += tensor.nbytes
            context.progress(done, total, "bytes")
    checkpoint.save(gathered, path)


def _entries(tensors: Table) -> TensorTable:
    return {n: (entry[1], tuple(entry[2])) for n, entry in tensors.items()}


def _inputs(tensors: dict[str, TensorInfo], steps: dict[str, Step]) -> tuple[tuple[Step, ...], Table]:
    """The shards that contain these tensors, and the place of each tensor."""
    shards = sorted({t.file for t in tensors.values()})
    return tuple(steps[s] for s in shards), intake.table_of(tensors, shards)
