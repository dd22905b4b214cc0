"""Take out what trimming has decided: experts of a layer, its MoE block, or whole decoder layers, whose successors are renumbered.

He et al., arXiv 2406.02500, section 4. What stays is bit for bit what it was.
"""

import json
from dataclasses import replace
from typing import Any

from moeflow.arch import Config, arch_of
from moeflow.methods.drop import link_all, rewrite
from moeflow.methods.trim_choices import read_trim
from moeflow.model.layout import headers, kept, left, read_config
from moeflow.model.spec import LayerSpec, RestSpec
from moeflow.step import Artifact, Context, Spec, step


def _experts_spec(rest: RestSpec, given: LayerSpec, chosen: Any, *, layer: int, keep: int, least: int) -> Spec:
    given.check_routing("drop experts")
    names = {n: (n, False) for n in left(given.tensors, rest.config, layer)}
    if keep:
        names = kept(given.tensors, rest.config, layer, list(range(given.experts if keep < 0 else keep)))
    most = given.experts if keep < 0 else keep
    table = {}
    for old, (new, sliced) in names.items():
        dtype, shape = given.tensors[old]
        table[new] = (dtype, (most, *shape[1:]) if sliced else shape)
    share = given.share * chosen["share"] if keep < 0 else given.share
    out = LayerSpec(rest.config, layer, most, table, share, min(least, given.least) if keep < 0 else None, given.slimmed)
    return Spec(out, reads=out.nbytes, writes=out.nbytes, memory=2 * out.nbytes)


@step("trim.experts", version=1, spec=_experts_spec)
def experts(context: Context, config: Artifact, given: Artifact, chosen: Artifact, *, layer: int, keep: int, least: int) -> None:
    """One layer's file with the experts that stay, renumbered, and the router's rows for them.

    `keep`: how many stay, where that is known when the graph is built; -1: as many as were chosen, `least` of them at least.
    Without any, the shared expert stays with its gate and the norm before it; where the family has none, nothing of the block does.
    """
    decided = read_trim(chosen)
    if not decided["drop"][str(layer)]:
        link_all(context, given)
        return
    choice, tensors, read = decided["keep"][str(layer)], headers(given), read_config(config)
    names = kept(tensors, read, layer, choice) if choice else {n: (n, False) for n in left(tensors, read, layer)}
    rewrite(context, given, tensors, names, choice)


def _moe_spec(rest: RestSpec, given: LayerSpec, chosen: Any, *, layer: int) -> Spec:
    out = replace(given, share=given.share * chosen["share"], fewest=0)
    return Spec(out, reads=given.nbytes, writes=given.nbytes, memory=2 * given.nbytes)


@step("trim.moe", version=1, spec=_moe_spec)
def moe(context: Context, config: Artifact, given: Artifact, chosen: Artifact, *, layer: int) -> None:
    """One layer's file, without its MoE block and the norm before it where that was chosen."""
    if layer not in read_trim(chosen)["drop"]:
        link_all(context, given)
        return
    tensors = headers(given)
    kept_names = left(tensors, read_config(config), layer, whole=True)
    rewrite(context, given, tensors, {n: (n, False) for n in kept_names}, [])


def _renumbered_spec(chosen: Any, *candidates: LayerSpec, config: Config, first: int, to: int) -> Spec:
    arch = arch_of(config)
    tables = [{arch.prefix(to) + n.removeprefix(arch.prefix(c.layer)): t for n, t in c.tensors.items()} for c in candidates]
    largest = max(range(len(candidates)), key=lambda i: candidates[i].nbytes)
    given, share = candidates[largest], candidates[largest].share
    if any(t != tables[0] for t in tables) or any(c.share != share for c in candidates):
        average = sum(c.expert_bytes * c.share for c in candidates) / len(candidates)
        share = min(average / max(1, given.expert_bytes), 0.999)
    out = LayerSpec(config, to, given.experts, tables[largest], share, min(c.least for c in candidates), given.slimmed)
    return Spec(out, reads=given.nbytes, writes=out.nbytes, memory=2 * given.nbytes)


@step("trim.renumber", version=1, spec=_renumbered_spec)
def renumbered(context: Context, chosen: Artifact, *candidates: Artifact, config: Config, first: int, to: int) -> None:
    """The file of layer `to` of the model that has fewer: that of the layer which comes there, under its new number.

    `candidates`: those that may, from the old layer `first` on.
    """
    from moeflow.model import checkpoint

    old = read_trim(chosen)["keep"][to]
    given = candidates[old - first]
    if old == to:
        link_all(context, given)
        return
    prefix = {n: arch_of(config).prefix(n) for n in (old, to)}
    for name in given.names():
        if name.endswith(".safetensors"):
            tensors = {n: t for n, t in headers(given).items() if t.file == name}
            read = checkpoint.read_many(given, tensors)
            checkpoint.save({prefix[to] + n.removeprefix(prefix[old]): t for n, t in read}, context.out / name)
        else:  # what was told of the layer, under its number
            value = json.loads(given.read(name, 0, given.size(name)))
            (context.out / name).write_text(json.dumps(value | {"layer": to} if "layer" in value else value) + "\n")
