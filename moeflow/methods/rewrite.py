"""Helpers of all steps that rewrite: a layer's file with the experts that stay, and a model with another configuration."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeflow.arch import Config, essential
from moeflow.methods.graph import Model
from moeflow.methods.records import Facts, kept_experts
from moeflow.model.header import TensorInfo
from moeflow.model.layout import ESSENTIAL, LAYER, experts_in, headers, kept, names_without_experts, read_config
from moeflow.model.spec import LayerSpec, RestSpec
from moeflow.step import Artifact, Context, Spec, Step, step


def _experts_spec(rest: RestSpec, before: LayerSpec, decision: Mapping[str, Any], *, layer: int, keep: int | None) -> Spec:
    before.check_routing("prune")
    if keep is not None and keep > before.least:
        raise ValueError(
            f"keep={keep}: layer {layer} has between {before.least} and {before.experts} experts, as a run decides; keep at most "
            f"{before.least}, or take the result of that run as the model"
        )
    of, stay = decision.get("layer", layer), decision["keep"]
    if (of, stay) != (layer, keep):
        raise ValueError(f"the decision is for layer {of} and keeps {stay} experts, not for layer {layer} and {keep}")
    most = before.experts if keep is None else keep
    names = experts_kept(before.tensors, rest.config, layer, list(range(most)))
    table = {}
    for old, (new, sliced) in names.items():
        dtype, shape = before.tensors[old]
        across = len(shape) > 1 and shape[0] == 1  # [1, E]
        table[new] = (dtype, shape if not sliced else (1, most) if across else (most, *shape[1:]))
    share, least = before.share, None
    if keep is None:
        share, least = share * decision["share"], min(decision["least"], before.least)
    stays = before.elsewhere and most == before.experts
    out = replace(
        before, config=rest.config, experts=most, tensors=table, share=share, fewest=least, elsewhere=stays, changed=keep is None
    )
    moved = 0 if keep == before.experts else out.nbytes  # or else it is linked
    return Spec(out, reads=moved, writes=moved, memory=2 * out.nbytes)


@step("rewrite.experts", version=2, spec=_experts_spec)
def experts(
    context: Context, config: Artifact, layer_files: Artifact, decision: Artifact, *, layer: int, keep: int | None = None
) -> None:
    """One layer's files with the experts that a `decision` keeps, renumbered from zero, and the router's rows for them.

    All else stays bit for bit, and only what stays is read. If no expert stays, the shared expert still does, with its gate and the
    norm before it; a family without one loses the whole MoE block. `keep`: how many stay, if the graph already knows.
    """
    chosen = kept_experts(decision, layer)
    if keep is not None and len(chosen) != keep:
        raise ValueError(f"the decision keeps {len(chosen)} experts of layer {layer}, not {keep}")
    tensors, read = headers(layer_files), read_config(config)
    before = experts_in(tensors, read, layer)
    if len(chosen) == before:
        link_all(context, layer_files)
        return
    rewrite(context, layer_files, tensors, experts_kept(tensors, read, layer, chosen), chosen)
    Facts.of(layer_files).and_then("rewrite.experts", experts=before, keep=chosen).write(context.out)


def pruned(model: Model, choices: Mapping[int, Step]) -> Model:
    """The model with the experts that the choice of each of these layers keeps, as a graph.

    Prediction layers may be among them. Raises ValueError if they are to stay as they are, and decoder layers get other counts.
    """
    for choice in choices.values():
        model.check_keep(choice.spec.output["keep"])
    layers = {
        i: experts(model.essential, model.layer(i), choice, layer=i, keep=choice.spec.output["keep"])
        for i, choice in choices.items()
    }
    return model.with_layers(layers, tuple(choices.values()))


def rewrite(
    context: Context, layer_files: Artifact, tensors: Mapping[str, TensorInfo], names: Mapping[str, tuple[str, bool]],
    rows: list[int],
) -> None:  # fmt: skip
    """Write a layer's file with the tensors in `names`, renamed, and some cut to these rows (`layout.kept`)."""
    from moeflow.model import checkpoint

    written: dict[str, Any] = {}
    for old, tensor in checkpoint.read_many(layer_files, {old: tensors[old] for old in names}):
        new, sliced = names[old]
        written[new] = checkpoint.of_experts(tensor, rows) if sliced else tensor
        context.progress(len(written), len(names), "tensors")
    checkpoint.save(written, context.out / LAYER)


def experts_kept(names: Iterable[str], config: Config, layer: int, experts: list[int]) -> dict[str, tuple[str, bool]]:
    """How to rewrite a layer's file if only `experts` stay, perhaps none (`layout.kept`)."""
    return kept(names, config, layer, experts) if experts else {n: (n, False) for n in names_without_experts(names, config, layer)}


def link_all(context: Context, folder: Artifact, but: Sequence[str] = ()) -> None:
    """Link an input's files into the output, except those that the step writes itself."""
    for name in folder.names():
        if name not in but:
            context.link(folder, name)


def readable(value: Mapping[str, Any]) -> str:
    """A value as the text of a JSON file of a checkpoint."""
    return json.dumps(value, indent=2) + "\n"


def config_files(config: Config) -> dict[str, str]:
    """The texts of config.json, and of the file with the part of it that changes what the model computes."""
    return {"config.json": readable(config), ESSENTIAL: readable(essential(config))}


def write_config(config: Config, folder: Path) -> None:
    for name, text in config_files(config).items():
        (folder / name).write_text(text)


def _configured_spec(rest: RestSpec, *, config: Config) -> Spec:
    out = RestSpec(config, rest.tensors, rest.files)
    return Spec(out, reads=0, writes=sum(map(len, config_files(config).values())), memory=1 << 24)


@step("rewrite.configured", version=1, spec=_configured_spec)
def configured(context: Context, before: Artifact, *, config: Config) -> None:
    """All but the decoder layers, with another configuration."""
    link_all(context, before, but=tuple(config_files(config)))
    write_config(config, context.out)


def _joined_spec(parts: tuple[LayerSpec, ...]) -> Spec:
    nbytes = parts[0].nbytes
    return Spec(parts[0], reads=nbytes, writes=nbytes + 300 + 200 * parts[0].experts, memory=nbytes + (1 << 29))


@step("rewrite.joined", version=1, spec=_joined_spec)
def joined(context: Context, parts: tuple[Artifact, ...]) -> None:
    """One layer's file and report, joined from those of its parts, each of which has treated some of the experts."""
    from moeflow.model.checkpoint import read_many, save

    first = parts[0]
    if not all(LAYER in p.names() for p in parts):  # the layer is unchanged
        link_all(context, first)
        return
    link_all(context, first, but=(LAYER, Facts.FILE))
    here = [{n: t for n, t in headers(part).items() if t.file == LAYER} for part in parts]
    save({n: t for part, info in zip(parts, here, strict=True) for n, t in read_many(part, info)}, context.out / LAYER)
    *earlier, last = Facts.of(first).done
    report = [entry for p in parts for entry in Facts.of(p).done[-1]["experts"]]
    report.sort(key=lambda entry: (entry["expert"] == "shared", entry["expert"]))
    Facts((*earlier, {**last, "experts": report})).write(context.out)
