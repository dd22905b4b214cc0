"""What the steps that assemble a checkpoint's folder are made of: what they need, the index, config.json and the history."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from moeflow import __version__
from moeflow.arch import ARCH, Config, Family, Layout, family_config
from moeflow.methods.checkpoint import export, prediction
from moeflow.methods.graph import REST
from moeflow.methods.records import Facts, decision
from moeflow.methods.rewrite import link_all, readable
from moeflow.model import operations
from moeflow.model.engine_form import form_of
from moeflow.model.formats import config_of, format_of
from moeflow.model.layout import ESSENTIAL, headers
from moeflow.model.packed import Shapes, check_whole, quantization_config, schemes_of
from moeflow.model.spec import CheckpointSpec, LayerSpec, RestSpec, TensorTable, file_bytes, header_bytes
from moeflow.model_files import HISTORY, INDEX, PROCESSORS, named_like
from moeflow.step import Artifact, Context, Spec

Put = Callable[[Context, Artifact, str, str], None]
"""What puts a file of an input into the output, under another name."""


def assemble_spec(
    rest: RestSpec, layers: tuple[LayerSpec, ...], prediction_layers: tuple[LayerSpec, ...], choices: tuple[Any, ...],
    *, config: Config,
) -> Spec:  # fmt: skip
    prediction.check_beside(layers, prediction_layers)
    layers += prediction_layers
    tables = [layer.tensors for layer in layers] + [rest.tensors]
    _packing([{n: shape for n, (_, shape) in table.items()} for table in tables], [layer.experts for layer in layers], config)
    headers = sum(layer.headers for layer in layers) + header_bytes(rest.tensors)
    names = sum(len(n) + 44 for table in tables for n in table) + len(readable(config.get(ARCH, {})))
    weights = sum(layer.nbytes for layer in layers) + file_bytes(rest.tensors)
    parameters = sum(layer.numel for layer in layers) + LayerSpec(config, -1, 0, rest.tensors).numel
    active = sum(layer.active for layer in layers) + operations.head_numel(rest)
    form = form_of(layers, config)
    out = CheckpointSpec(
        config, weights, parameters, headers, sum(rest.files.values()) + names + 3000, active, form,
        sum(i.one_rank for i in layers), sum(i.heads for i in layers),
    )  # fmt: skip
    return Spec(out, reads=headers, writes=names + 3000, memory=1 << 24)


def assemble_as_spec(
    rest: RestSpec, layers: tuple[LayerSpec, ...], files: tuple[Any, ...] = (), beside: Any = None, choices: tuple[Any, ...] = (),
    *, config: Config, form: Mapping[str, Any],
) -> Spec:  # fmt: skip
    count = Family.of(config).num_layers
    plain: CheckpointSpec = assemble_spec(rest, layers[:count], layers[count:], choices, config=config).output
    more = [f for f in files if isinstance(f, LayerSpec)] or list(layers)
    others: TensorTable = {} if beside is None else beside.tensors
    headers = sum(f.headers for f in more) + header_bytes(rest.tensors) + header_bytes(others)
    weights = sum(f.nbytes for f in more) + file_bytes(rest.tensors) + file_bytes(others)
    parameters = plain.parameters + sum(prod(shape) for _, shape in others.values())
    written = plain.others - sum(rest.files.values()) + len(form["whole"]) + sum(len(n) + 44 for n in others)
    small = written + sum(rest.files.values())
    asked = plain.form and replace(plain.form, own=form["own"])
    out = replace(plain, nbytes=weights, parameters=parameters, headers=headers, others=small, form=asked)
    return Spec(out, reads=headers, writes=written, memory=1 << 24, notes=(form["note"],) if form["note"] else ())


def written_spec(before: LayerSpec | RestSpec, *, at: int | None, layout: Mapping[str, Any]) -> Spec:
    tensors = export.table(before.tensors, Layout.from_json(layout), at)
    out = replace(before, tensors=tensors, elsewhere=False) if isinstance(before, LayerSpec) else before
    size = file_bytes(tensors)
    return Spec(out, reads=file_bytes(before.tensors), writes=size, memory=3 * size)


def linked(context: Context, artifact: Artifact, name: str, to: str) -> None:
    """Link a file of an input into the output as `to`, wherever its bytes lie."""
    context.link(artifact, name, to)


def kept(context: Context, artifact: Artifact, name: str, to: str) -> None:
    """Link a file of an input into the output as `to`; what lies at the source only is copied, so that the output lasts."""
    from moeflow.sources.elsewhere import Seen

    if isinstance(artifact, Seen) and name in artifact.elsewhere:
        artifact.copy(name, context.out / to)
    else:
        linked(context, artifact, name, to)


def write(
    context: Context, rest: Artifact, every: Sequence[Artifact], choices: Sequence[Artifact], config: Config, decoder: int, put: Put
) -> None:
    """Write the folder of a checkpoint of these layers, of which the first `decoder` are decoder layers."""
    _put_weights(context, (*every, rest), put)
    (context.out / "config.json").write_text(readable(_config_json(every, rest, config, decoder)))
    link_all(context, rest, but=(REST, ESSENTIAL, "config.json"))
    _write_history(context, every, choices)


def write_as(
    context: Context, rest: Artifact, layers: Sequence[Artifact], weights: Sequence[Artifact], choices: Sequence[Artifact],
    config: Config, form: Mapping[str, Any], put: Put,
) -> None:  # fmt: skip
    """Write the folder of a checkpoint in another form, with these `weights`; see `steps.assemble_as`."""
    layout = Layout.from_json(form["layout"])
    _put_weights(context, weights, put)
    text = _config_json(layers, rest, config, Family.of(config).num_layers, own=form["own"])
    whole = export.result(text, json.loads(form["whole"]), layout) if form["whole"] else text
    (context.out / "config.json").write_text(readable(export.without_arch(whole)))
    processors = () if form["whole"] else tuple(n for n in rest.names() if named_like(n, PROCESSORS))
    link_all(context, rest, but=(REST, ESSENTIAL, "config.json", *processors))
    _write_history(context, layers, choices)
    if form["note"]:
        context.note(form["note"])


def _put_weights(context: Context, artifacts: Sequence[Artifact], put: Put) -> None:
    """Put the safetensors files of these artifacts into the checkpoint, and write its index."""
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
        put(context, artifact, name, target)
        weight_map |= dict.fromkeys(tensors, target)
        total += sum(t.nbytes for t in tensors.values())
    (context.out / INDEX).write_text(readable({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}))


def _config_json(every: Sequence[Artifact], rest: Artifact, config: Config, decoder: int, *, own: bool = False) -> Config:
    """The config.json of the text model with these layers, of which the first `decoder` are decoder layers."""
    tables = [{n: t.shape for n, t in headers(artifact).items()} for artifact in (*every, rest)]
    formats = [format_of(table, config, i) for i, table in enumerate(tables[:-1])]
    prediction.check_counts((f.experts for f in formats[:decoder]), (f.experts for f in formats[decoder:]))
    packing, differ = _packing(tables, [f.experts for f in formats], config)
    kept = [f if f.experts or f.gone else None for f in formats[:decoder]]
    return config_of(family_config(config), kept, own=own or differ) | packing


def _write_history(context: Context, every: Sequence[Artifact], choices: Sequence[Artifact]) -> None:
    done = [{"layer": i, "done": facts.done} for i, facts in enumerate(map(Facts.of, every)) if facts.done]
    history = {"moeflow": __version__, "choices": [decision(c) for c in choices], "layers": done}
    (context.out / HISTORY).write_text(readable(history))


def _packing(tables: Sequence[Shapes], experts: Sequence[int], config: Config) -> tuple[dict[str, Any], bool]:
    """The entries of config.json that describe packed matrices, none if there are none; and whether the family's own classes do not
    load them: layers with experts differ in how they are packed, or have zero points."""
    for layer, (table, count) in enumerate(zip(tables, experts, strict=False)):
        check_whole(table, layer, config, count)
    shapes = {n: shape for table in tables for n, shape in table.items()}
    schemes = schemes_of(shapes, config)
    said = {"quantization_config": quantization_config(schemes, shapes, config)} if schemes else {}
    zeros = any(not scheme.symmetric for scheme in schemes.values())
    return said, zeros or len({schemes.get(i) for i, count in enumerate(experts) if count}) > 1
