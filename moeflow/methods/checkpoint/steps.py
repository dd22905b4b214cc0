"""Read and write checkpoints: split one into a file per decoder layer and one for the rest, and assemble a folder from them.

Hub shards straddle layers, so a fine-tune of one layer would change several; layer files do not. Assembling lists blobs and moves
none.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from moeflow.arch import ARCH, Config, Family, Layout, essential, layer_of
from moeflow.arch.found import Found, shapes_of
from moeflow.arch.stock import as_engines_read
from moeflow.methods.checkpoint import adapter as adapters
from moeflow.methods.checkpoint import assembling, export, foreign, intake, prediction, reading, remote_code, splitting
from moeflow.methods.checkpoint.adapter import Addition
from moeflow.methods.checkpoint.splitting import Table
from moeflow.methods.graph import REST, Form, Model
from moeflow.methods.records import Facts
from moeflow.methods.rewrite import link_all, write_config
from moeflow.model.asked import check_layer, check_rest
from moeflow.model.header import TensorInfo
from moeflow.model.layout import LAYER, headers
from moeflow.model.packed import METHOD
from moeflow.model.spec import LayerSpec
from moeflow.model_files import HISTORY, TRAVELLING, named_like
from moeflow.sources import Mtp, Source
from moeflow.step import Artifact, Context, Step, step


def pinned(source: Source, *, mtp: Mtp | None = None, found: Found | None = None) -> Model:
    """The checkpoint at a pinned source (a folder, a hub repository at a commit, an `s3://` prefix).

    Reads config.json, the index, the safetensors headers and the small files beside them, no weights. `mtp`: "drop" the
    multi-token-prediction layers, "keep" them unchanged, or "prune" them with the decoder layers; None: as the source says.
    `found`: what is known of the checkpoint; None: it is looked at.

    Raises ValueError for an unknown family, a checkpoint packed in a way that moeflow does not read, a file that is damaged or says
    what cannot be, and tensors that are not exactly those that config.json asks for.
    """
    if (mtp := mtp or source.mtp) not in get_args(Mtp):
        raise ValueError(f"mtp={mtp!r}; choose 'drop', 'keep' or 'prune'")
    adapters.check(source)
    stored = reading.tensors_of(source)
    found = found or reading.looked_at(source, stored)
    stored, ignored = foreign.without_buffers(stored, found.layout.beside if found else ())
    whole, config = reading.config_of(source, found)
    family = Family.of(config)
    small = sorted(f.name for f in source.files if named_like(f.name, TRAVELLING) and not f.name.endswith(".py"))
    configs = reading.small_configs(source, small) | {"config.json": whole}
    code = remote_code.code_of(source, configs)
    apart = () if mtp == "drop" else prediction.apart(stored, family, found)
    numbered = {Layout(apart=apart).numbered(n): t for n, t in stored.items()}
    layout = replace(intake.layout_of(numbered, family, found, source.uri), apart=apart)
    of_mtp = prediction.settled(config, intake.pieces(numbered, layout, family, source.uri), mtp, source.uri, layout)
    config, tensors = of_mtp.config, of_mtp.tensors
    reading.check_packing(tensors, config, source.uri)
    outside = {n: t for n, t in stored.items() if layout.beside and n.startswith(layout.beside)}
    if (config.get("quantization_config") or {}).get("quant_method") == METHOD:  # written again for what is packed then
        config = {k: v for k, v in config.items() if k != "quantization_config"}  # `whole`, which it may be, keeps it
    merge = adapters.merge_of(source.adapter, config, tensors, layout) if source.adapter else None
    steps = {name: source.weights(name) for name in sorted({t.file for t in stored.values()})}
    count = family.num_layers
    by_layer: dict[int | None, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        by_layer.setdefault(layer_of(name), {})[name] = info
    if missing := sorted(set(range(count)) - set(by_layer)):
        raise ValueError(f"config.json says {count} layers, but the checkpoint has no tensor of layer {missing[0]}")

    history = source.file(HISTORY) if HISTORY in source.names() else None
    shapes = shapes_of(config) if found is None else found.shapes

    def layer_step(i: int) -> Step:
        shards, table = _inputs(by_layer[i], steps)
        if i < count:
            check_layer(config, i, {n: (t.dtype, t.shape) for n, t in by_layer[i].items()}, shapes)
        if merge and (additions := merge.of(by_layer[i])):
            return merged_layer(
                shards, merge.step(), history,
                config=essential(config), layer=i, tensors=table, additions=additions, moved=merge.moved(additions),
            )  # fmt: skip
        return layer(shards, history, config=essential(config), layer=i, tensors=table)

    shards, table = _inputs(by_layer.get(None, {}), steps)
    check_rest(config, {n: (t.dtype, t.shape) for n, t in by_layer.get(None, {}).items()}, shapes)
    texts = source.group(small or ["config.json"])
    others = rest(texts, shards, source.group(code) if code else None, config=config, files=small, tensors=table, note=of_mtp.note)
    if merge and (additions := merge.of(table)):
        others = merged_rest(others, merge.step(), additions=additions, moved=merge.moved(additions))
    left = foreign.note_of_left(source, (*small, *code, *steps))
    return Model(
        config=config,
        rest=others.noting(*(n for n in (ignored, left, merge.note() if merge else "") if n)),
        texts=texts,
        layers=tuple(layer_step(i) for i in range(count)),
        extra=tuple(layer_step(i) for i in of_mtp.layers),
        form=_form(whole, config, intake.wanted(layout, source.layout, family), outside, steps),
        mtp=mtp,
        tokenizer_code=remote_code.tokenizer_code(configs.get("tokenizer_config.json", {}), small),
        has_template=reading.has_template(configs, small),
    )


def _form(whole: Config, config: Config, layout: Layout, outside: dict[str, TensorInfo], steps: dict[str, Step]) -> Form | None:
    """How a result is written, if not as the layer files are; `outside`: the tensors beside the text model."""
    if layout == Layout(per_expert=layout.per_expert) and ARCH not in config:
        return None
    if not outside:
        return Form(whole, layout)
    shards, table = _inputs(outside, steps)
    return Form(whole, layout, beside(shards, tensors=table))


def _inputs(tensors: dict[str, TensorInfo], steps: dict[str, Step]) -> tuple[tuple[Step, ...], Table]:
    """The shards that contain these tensors, and the place of each tensor."""
    shards = sorted({t.file for t in tensors.values()})
    return tuple(steps[s] for s in shards), intake.table_of(tensors, shards)


@step("checkpoint.layer", version=1, spec=splitting.layer_spec)
def layer(
    context: Context, shards: tuple[Artifact, ...], history: Artifact | None = None, *, config: Config, layer: int, tensors: Table
) -> None:
    """Write one decoder layer: `layer.safetensors`, under the hub's names, and what routing adds to it: `routing.safetensors`.

    `history`: the `moeflow.json` of a checkpoint that moeflow wrote; the layer's facts begin with what it says of this layer.
    Raises ValueError if a weight is NaN or infinite.
    """
    splitting.gather_layer(context, shards, tensors)
    if done := splitting.done_before(history, layer):
        done.write(context.out)


@step("checkpoint.merged_layer", version=1, spec=splitting.merged_layer_spec)
def merged_layer(
    context: Context, shards: tuple[Artifact, ...], adapter: Artifact, history: Artifact | None = None,
    *, config: Config, layer: int, tensors: Table, additions: Mapping[str, Addition], moved: int,
) -> None:  # fmt: skip
    """Write one decoder layer as `checkpoint.layer` does, with an adapter merged into its weights.

    `additions`: what the adapter makes of the tensors that it changes; `moved`: the bytes that are read of it. Raises ValueError
    also if a merged weight is NaN or infinite.
    """
    splitting.gather_layer(context, shards, tensors, splitting.merging(context, adapter, additions))
    scales = sorted({a.scale for a in additions.values() if a.a})
    (splitting.done_before(history, layer) or Facts()).and_then(
        "checkpoint.merged_layer", tensors=len(additions), scales=scales
    ).write(context.out)


@step("checkpoint.rest", version=1, spec=splitting.rest_spec)
def rest(
    context: Context, texts: Artifact, shards: tuple[Artifact, ...], code: Artifact | None = None,
    *, config: Config, files: list[str], tensors: Table, note: str,
) -> None:  # fmt: skip
    """Write all but the decoder layers: `rest.safetensors`, config.json, and the small files that belong to the checkpoint.

    `code`: the Python files of classes of its own, which nobody runs here.
    """
    splitting.gather(context, shards, tensors, context.out / REST)
    write_config(config, context.out)
    if note:
        context.note(note)
    for name in files:
        context.link(texts, name)
    if code:
        link_all(context, code)


@step("checkpoint.merged_rest", version=1, spec=splitting.merged_rest_spec)
def merged_rest(context: Context, before: Artifact, adapter: Artifact, *, additions: Mapping[str, Addition], moved: int) -> None:
    """What is not of a decoder layer, with an adapter merged into embedding, final norm or head; see `merged_layer`."""
    from moeflow.model.checkpoint import Tensors, save

    change = splitting.merging(context, adapter, additions)
    save({name: change(name, tensor) for name, tensor in Tensors(before).items()}, context.out / REST)
    link_all(context, before, but=(REST,))


@step("checkpoint.beside", version=1, spec=splitting.beside_spec)
def beside(context: Context, shards: tuple[Artifact, ...], *, tensors: Table) -> None:
    """The tensors of a multimodal model beside its text model, such as the vision tower's, bit for bit and under their names."""
    splitting.gather(context, shards, tensors, context.out / export.BESIDE, finite=False)


@step("checkpoint.assemble", version=2, spec=assembling.assemble_spec)
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
    assembling.write(context, rest, (*layers, *prediction_layers), choices, config, len(layers), assembling.kept)


@step("checkpoint.listed", version=1, spec=assembling.assemble_spec)
def listed(
    context: Context, rest: Artifact, layers: tuple[Artifact, ...], prediction_layers: tuple[Artifact, ...] = (),
    choices: tuple[Artifact, ...] = (), *, config: Config,
) -> None:  # fmt: skip
    """As `assemble`, of layers whose files may lie at the source: for steps that read it, and no result."""
    assembling.write(context, rest, (*layers, *prediction_layers), choices, config, len(layers), assembling.linked)


@step("checkpoint.assemble_as", version=2, spec=assembling.assemble_as_spec)
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
    weights = (*(files or (*layers, rest)), *([] if beside is None else [beside]))
    assembling.write_as(context, rest, layers, weights, choices, config, form, assembling.kept)


@step("checkpoint.listed_as", version=1, spec=assembling.assemble_as_spec)
def listed_as(
    context: Context, rest: Artifact, layers: tuple[Artifact, ...], files: tuple[Artifact, ...] = (),
    beside: Artifact | None = None, choices: tuple[Artifact, ...] = (), *, config: Config, form: dict[str, Any],
) -> None:  # fmt: skip
    """As `assemble_as`, of layers whose files may lie at the source: for steps that read it, and no result."""
    weights = (*(files or (*layers, rest)), *([] if beside is None else [beside]))
    assembling.write_as(context, rest, layers, weights, choices, config, form, assembling.linked)


@step("checkpoint.written", version=1, spec=assembling.written_spec)
def written(context: Context, before: Artifact, *, at: int | None, layout: dict[str, Any]) -> None:
    """One layer's file, or that of the rest (`at` is none), under the names and in the stacks of a `Layout`."""
    export.write(before, headers(before), Layout.from_json(layout), at, context.out / (REST if at is None else LAYER))


@step("checkpoint.own", version=1, spec=splitting.own_spec)
def own(context: Context, before: Artifact) -> None:
    """The same layer; what of it lies at the source only is copied, so that a checkpoint rests on nothing outside the store."""
    for name in before.names():
        assembling.kept(context, before, name, name)


def lasting(model: Model) -> Model:
    """The same model as a graph whose layers' files are all in the store, as those of a result have to be.

    Where a checkpoint in the form of the source has all layers written anew, nothing changes.
    """
    if model.form is not None and _written_anew(export.written(model, model.form).layout):
        return model
    every = enumerate((*model.layers, *model.extra))
    return model.with_layers({i: own(layer) for i, layer in every if layer.spec.output.elsewhere})


def checkpoint_of(model: Model) -> Step:
    """The whole checkpoint as one artifact, in the form of its source as far as the model still fits into it."""
    model = lasting(model)
    if model.form is None:
        return counted(model)
    return _assembled_as(model, export.written(model, model.form), model.form)


def text_model_of(model: Model) -> Step:
    """A checkpoint of the text model alone, which transformers loads as a causal language model.

    If the model is not `lasting`, its files may lie at the source, which is enough for what only reads them.
    """
    if model.form is None:
        return counted(model)
    as_whole = export.written(model, model.form)
    if not as_whole.layout.inside:
        return _assembled_as(model, as_whole, model.form)
    return _assembled_as(model, replace(as_whole, layout=as_whole.layout.without_wrapper(), as_source=False), model.form)


def told_model_of(model: Model) -> Step:
    """A checkpoint of the text model alone whose config.json tells what was found of its family."""
    if model.form is None or ARCH not in model.config:
        return text_model_of(model)
    return _assembled_as(model, export.Written(Layout(), own=True, as_source=False), model.form)


def counted(model: Model) -> Step:
    """The same weights under the names that moeflow works on, for what counts them by name; transformers may not load it."""
    made = listed if _elsewhere(*model.layers, *model.extra) else assemble
    return made(model.rest, model.layers, model.extra, model.choices, config=as_engines_read(model.config))


def _elsewhere(*files: Step) -> bool:
    return any(isinstance(file.spec.output, LayerSpec) and file.spec.output.elsewhere for file in files)


def _written_anew(layout: Layout) -> bool:
    return bool(layout.renamed or layout.stacked)


def _assembled_as(model: Model, as_: export.Written, form: Form) -> Step:
    every, layout = (*model.layers, *model.extra), as_.layout
    files: tuple[Step, ...] = ()
    other = _written_anew(layout)
    if other or layout.apart:
        said = replace(layout, beside=(), inside=(), per_expert=False)
        decoder, behind = (replace(said, apart=pairs).to_json() for pairs in ((), layout.apart))
        files = tuple(written(f, at=i, layout=decoder) for i, f in enumerate(model.layers)) if other else model.layers
        files += tuple(written(f, at=i, layout=behind) for i, f in enumerate(model.extra, len(model.layers)))
        files += (written(model.rest, at=None, layout=decoder) if other else model.rest,)
    whole = json.dumps(form.whole) if as_.as_source else ""  # a text, because values lose the order of their keys
    told = {"whole": whole, "layout": layout.to_json(), "own": as_.own, "note": as_.note}
    beside = form.beside if as_.as_source else None
    made = listed_as if _elsewhere(*(files or every)) else assemble_as
    return made(model.rest, every, files, beside, model.choices, config=as_engines_read(model.config), form=told)
