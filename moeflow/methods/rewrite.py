"""What every rewriting step stands on: a layer's file with the experts that stay, and a model with another configuration."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moeflow.arch import Config, Family, essential
from moeflow.methods.records import read_choice
from moeflow.model.layout import ESSENTIAL, LAYER, TensorInfo, experts_in, headers, kept, read_config
from moeflow.model.spec import LayerSpec, RestSpec
from moeflow.step import Artifact, Context, Spec, step


def _drop_spec(rest: RestSpec, given: LayerSpec, chosen: Any, *, layer: int, keep: int) -> Spec:
    family = Family.of(rest.config)
    given.check_routing("prune")
    if keep > given.least:
        raise ValueError(
            f"keep={keep}: layer {layer} has between {given.least} and {given.experts} experts, as a run decides; keep at most "
            f"{given.least}, or take the result of that run as the model"
        )
    if keep:
        family.check_keep(keep, given.experts)
    if chosen["layer"] != layer or chosen["keep"] != keep:
        raise ValueError(f"the choice is for layer {chosen['layer']} and keeps {chosen['keep']}, not for layer {layer} and {keep}")
    most = keep or given.experts
    names = kept(given.tensors, rest.config, layer, list(range(most)))
    table = {}
    for old, (new, sliced) in names.items():
        dtype, shape = given.tensors[old]
        table[new] = (dtype, (most, *shape[1:]) if sliced else shape)
    share, fewest = (given.share, None) if keep else (given.share * chosen["share"], family.legal_counts(most)[0])
    out = replace(given, config=rest.config, experts=most, tensors=table, share=share, fewest=fewest)
    return Spec(out, reads=out.nbytes, writes=out.nbytes, memory=2 * out.nbytes)


@step("rewrite.experts", version=1, spec=_drop_spec)
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


def config_text(config: Config) -> str:
    """A config.json, as every step writes it."""
    return json.dumps(config, indent=2) + "\n"


def _configured_spec(given: RestSpec, *, config: Config) -> Spec:
    out = RestSpec(config, given.tensors, given.files)
    return Spec(out, reads=0, writes=len(config_text(config)) + len(config_text(essential(config))), memory=1 << 24)


@step("rewrite.configured", version=1, spec=_configured_spec)
def configured(context: Context, given: Artifact, *, config: Config) -> None:
    """What is no decoder layer, with another configuration."""
    for name in given.names():
        if name not in (ESSENTIAL, "config.json"):
            context.link(given, name)
    (context.out / "config.json").write_text(config_text(config))
    (context.out / ESSENTIAL).write_text(config_text(essential(config)))
