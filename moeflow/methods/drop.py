"""Apply choices: rewrite a layer with the experts that stay, and assemble a checkpoint from layer files.

One `drop` serves every search. Assembling lists blobs and moves none.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeflow import __version__
from moeflow.arch import Config, arch_of
from moeflow.methods.choose import read_choice
from moeflow.methods.decompose import DECOMPOSITION
from moeflow.methods.fetch import INDEX, REST, Model
from moeflow.methods.skipping import SKIP
from moeflow.methods.trim_choices import TRIM, read_trim
from moeflow.model.formats import config_of, family_config, format_of
from moeflow.model.layout import ESSENTIAL, LAYER, TensorInfo, experts_in, headers, kept, read_config
from moeflow.model.packed import Shapes, check_whole, quantization_config, scheme_of
from moeflow.model.spec import CheckpointSpec, LayerSpec, RestSpec, file_bytes, header_bytes
from moeflow.step import Artifact, Context, Spec, Step, step


def _drop_spec(rest: RestSpec, given: LayerSpec, chosen: Any, *, layer: int, keep: int) -> Spec:
    arch = arch_of(rest.config)
    given.check_routing("prune")
    if keep > given.least:
        raise ValueError(
            f"keep={keep}: layer {layer} has between {given.least} and {given.experts} experts, as a run decides; keep at most "
            f"{given.least}, or take the result of that run as the model"
        )
    if keep:
        arch.check_keep(rest.config, keep, given.experts)
    if chosen["layer"] != layer or chosen["keep"] != keep:
        raise ValueError(f"the choice is for layer {chosen['layer']} and keeps {chosen['keep']}, not for layer {layer} and {keep}")
    most = keep or given.experts
    names = kept(given.tensors, rest.config, layer, list(range(most)))
    table = {}
    for old, (new, sliced) in names.items():
        dtype, shape = given.tensors[old]
        table[new] = (dtype, (most, *shape[1:]) if sliced else shape)
    share, fewest = (given.share, None) if keep else (given.share * chosen["share"], arch.legal_counts(rest.config, most)[0])
    out = LayerSpec(rest.config, layer, most, table, share, fewest, given.slimmed)
    return Spec(out, reads=out.nbytes, writes=out.nbytes, memory=2 * out.nbytes)


@step("drop.experts", version=1, spec=_drop_spec)
def experts(context: Context, config: Artifact, given: Artifact, chosen: Artifact, *, layer: int, keep: int) -> None:
    """One layer's file with its chosen experts, renumbered from zero, and the router's rows for them; all else bit for bit.

    `keep`: how many stay, where that is known when the graph is built; 0: as many as the choice says. Reads only what stays.
    """
    choice = read_choice(chosen)["keep"]
    if keep and len(choice) != keep:
        raise ValueError(f"the choice keeps {len(choice)} experts of layer {layer}, not {keep}")
    tensors = headers(given)
    names = kept(tensors, read_config(config), layer, choice)
    if len(choice) == experts_in(tensors, read_config(config), layer):
        context.link(given, LAYER)
        return
    rewrite(context, given, tensors, names, choice)


def rewrite(
    context: Context, given: Artifact, tensors: Mapping[str, TensorInfo], names: Mapping[str, tuple[str, bool]], rows: list[int]
) -> None:
    """Write a layer's file with the tensors that `names` lists under their new names, of some only these rows (`layout.kept`)."""
    from moeflow.model import checkpoint

    found: dict[str, Any] = {}
    for old, tensor in checkpoint.read_many(given, {old: tensors[old] for old in names}):
        new, sliced = names[old]
        found[new] = tensor[rows] if sliced else tensor
        context.progress(len(found), len(names), "tensors")
    checkpoint.save(found, context.out / LAYER)


def link_all(context: Context, given: Artifact) -> None:
    """Let the output be what an input is."""
    for name in given.names():
        context.link(given, name)


def _assemble_spec(rest: RestSpec, *parts: Any, config: Config, extra: int) -> Spec:
    layers = [p for p in parts if isinstance(p, LayerSpec)]
    tables = [layer.tensors for layer in layers] + [rest.tensors]
    _packing([{n: shape for n, (_, shape) in table.items()} for table in tables], [p.experts for p in layers], config)
    headers = sum(layer.headers for layer in layers) + header_bytes(rest.tensors)
    names = sum(len(n) + 44 for table in tables for n in table)
    weights = sum(layer.nbytes for layer in layers) + file_bytes(rest.tensors)
    parameters = sum(layer.numel for layer in layers) + LayerSpec(config, -1, 0, rest.tensors).numel
    out = CheckpointSpec(config, weights, parameters, headers, sum(rest.files.values()) + names + 3000)
    return Spec(out, reads=headers, writes=names + 3000, memory=1 << 24)


@step("checkpoint.assemble", version=1, spec=_assemble_spec)
def assemble(context: Context, rest: Artifact, *parts: Artifact, config: Config, extra: int) -> None:
    """A checkpoint folder: layer files, index, config.json and what travels with it.

    In the family's own standard where all layers keep the same number of experts, every matrix whole; otherwise in moeflow's,
    which `moeflow.model.compressed` loads. `parts`: the layers in order, the last `extra` of them beyond the decoder, and then the
    choices that led here, which are told in `moeflow.json`, as are what was trimmed, what became of each expert in a decomposed
    layer and what the thresholds of skipping rest on. No weight is read or written: the folder lists the blobs that the layers
    already are.
    """
    layers = [p for p in parts if LAYER in p.names()]
    choices = [read_choice(p) for p in parts if "choice.json" in p.names()]
    tables = [headers(artifact) for artifact in (*layers, rest)]
    formats = [format_of({n: t.shape for n, t in table.items()}, config, i) for i, table in enumerate(tables[:-1])]
    files = [
        (artifact, name, {n: t for n, t in table.items() if t.file == name})
        for artifact, table in zip((*layers, rest), tables, strict=True)
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
    _write(context.out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    decoder = [f if f.experts or f.gone else None for f in formats[: len(layers) - extra]]
    packing = _packing([{n: t.shape for n, t in table.items()} for table in tables], [f.experts for f in formats], config)
    _write(context.out / "config.json", config_of(family_config(config), decoder) | packing)
    for name in rest.names():
        if name not in (REST, ESSENTIAL, "config.json"):
            context.link(rest, name)
    told: dict[str, Any] = {"moeflow": __version__, "choices": [{k: v for k, v in c.items() if k != "losses"} for c in choices]}
    if trimmed := [read_trim(p) for p in parts if TRIM in p.names()]:
        told["trimming"] = trimmed
    for what, name in (("decomposition", DECOMPOSITION), ("slimming", "slimmed.json"), ("skipping", SKIP)):
        if found := [json.loads(p.read(name, 0, p.size(name))) for p in layers if name in p.names()]:
            told[what] = found
    _write(context.out / "moeflow.json", told)


def _packing(tables: Sequence[Shapes], experts: Sequence[int], config: Config) -> dict[str, Any]:
    """What config.json says of packed matrices; nothing where there are none."""
    for layer, (table, count) in enumerate(zip(tables, experts, strict=False)):
        check_whole(table, layer, config, count)
    shapes = {n: shape for table in tables for n, shape in table.items()}
    scheme = scheme_of(shapes, config)
    return {"quantization_config": quantization_config(scheme, shapes, config)} if scheme else {}


def checkpoint_of(model: Model) -> Step:
    """The whole checkpoint as one artifact."""
    parts = (*model.layers, *model.extra, *model.choices)
    return assemble(model.rest, *parts, config=model.config, extra=len(model.extra))


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
