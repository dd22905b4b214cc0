"""Expert Trimming: a model with fewer experts, without the MoE blocks of some layers, or without whole decoder layers.

He et al., Demystifying the Compression of Mixture-of-Experts Through a Unified Framework (arXiv 2406.02500), section 4. One step
decides what goes, from what the calibration recorded, and writes `trim.json`; others take it out.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from moeflow.arch import Config, Family, family_config
from moeflow.arch.fewer_layers import with_fewer_layers
from moeflow.methods import rewrite
from moeflow.methods.graph import HIDDEN, Calibration, Model, load
from moeflow.methods.records import Facts, TrimmedExperts, TrimmedLayers, read_json
from moeflow.methods.scores import DROP_SCORES, OWN_SCORES
from moeflow.methods.trim.sets import sets as sets_of
from moeflow.model.layout import headers, names_without_experts, read_config
from moeflow.model.spec import LayerSpec, ObservedSpec, RestSpec
from moeflow.options import check_choices
from moeflow.step import Artifact, Context, Spec, Step, step

SCORED = "scores.json"


@dataclass(frozen=True)
class Trimming:
    """What is taken out of a model, and how much. Raises ValueError for invalid options."""

    what: Literal["experts", "moe_blocks", "decoder_layers"]
    """Experts (Expert Drop), MoE blocks with the norm before them (Layer Drop), or whole decoder layers (Block Drop)."""
    dropped: float
    """How many MoE blocks or decoder layers go, or how many experts per layer, on average across the model."""
    across: Literal["model", "layer"] = "model"
    """Rank all experts of the model together, or those of each layer separately."""
    criterion: Annotated[str, DROP_SCORES] = "router_score"
    """The score that ranks experts. router_score is the authors'; like them, it ranks those of a DeepSeek by routing_weight."""
    least: int | None = None
    """The fewest experts that may stay in a layer, if ranked across the model; none: as many as the router gives a token."""
    rule: Literal["discrete", "consecutive"] = "consecutive"
    """Drop decoder layers by their own similarities (the authors' setting for Mixtral), or adjacent ones together."""
    seed: int = 0
    """The seed of the criterion random."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.dropped < 0 or (self.least or 0) < 0:
            raise ValueError(f"dropped={self.dropped:g} and least={self.least} must not be negative")
        whole = "experts of each layer" if self.what == "experts" else self.what
        if (self.what != "experts" or self.across == "layer") and self.dropped != int(self.dropped):
            raise ValueError(f"dropped={self.dropped:g} {whole} is no whole number")


def trim(calibration: Calibration, how: Trimming) -> Model:
    """Build the graph of the calibrated model without what `how` takes out. Raises ValueError for invalid options."""
    return TRIM_KINDS[how.what].graph(calibration, how)


def expert_drop(calibration: Calibration, how: Trimming) -> Model:
    """Build the graph of the model without the experts that score lowest (section 4.1, Expert Drop).

    If fewer than top-k experts stay, a token gets all of them. A layer that loses all experts keeps its shared expert, if any.
    Prediction layers of which the calibration has a record keep as many as the layer that keeps most. Raises ValueError for counts
    that the router cannot work with.
    """
    model = calibration.model
    family, layers = Family.of(model.config), model.moe_layers
    specs = [model.layers[i].spec.output for i in layers]
    average = sum(spec.experts for spec in specs) / max(1, len(layers))
    keep = average - how.dropped
    if keep < 0:
        raise ValueError(f"dropped={how.dropped:g} experts of a layer must lie between 0 and the {average:g} that there are")
    if round(keep * len(layers)) < 1:
        raise ValueError(f"dropped={how.dropped:g} leaves no expert in {len(layers)} layers; at least one layer has to keep some")
    groups, _ = family.group_limit
    if how.across == "layer":
        if keep != int(keep):
            raise ValueError(f"dropped={how.dropped:g} leaves {keep:g} experts in each layer, no whole number; rank across='model'")
        for spec in specs:
            family.check_router(int(keep), spec.least)
        least = total = int(keep)
    else:
        legal = family.fewest(min(spec.experts for spec in specs))
        # experts go one at a time and could stop at a count that the router cannot run with, such as one for SparseMixer
        least = max(family.top_k if how.least is None else how.least, legal if legal > groups else 0)
        total = -(-round(keep * len(layers)) // groups) * groups
    criterion = OWN_SCORES.get(family.arch.model_type, how.criterion) if how.criterion == "router_score" else how.criterion
    needs, word = DROP_SCORES[criterion].needs, f"trim.criterion={criterion}"
    read = {i: calibration.counted(i, needs, word) for i in (*layers, *calibration.predicted)}
    same: dict[str, Any] = {"seed": how.seed, "dtype": calibration.dtype}
    scores, behind = (
        tuple(expert_scores(model.essential, model.layer(i), read[i], layer=i, criterion=criterion, **same) for i in of)
        for of in (layers, calibration.predicted)
    )
    chosen = choose_experts(scores, behind, across=how.across, keep=total, least=least, groups=groups)
    stay = chosen.spec.output["keep"]
    model.check_keep(stay)
    every = (*layers, *calibration.predicted)
    return model.with_layers(
        {i: rewrite.experts(model.essential, model.layer(i), chosen, layer=i, keep=stay) for i in every}, (chosen,)
    )


def layer_drop(calibration: Calibration, how: Trimming) -> Model:
    """Build the graph of the model without some layers' MoE blocks and the norms before them (section 4.2, Layer Drop).

    Those go that change the direction of the residual stream least, from before the norm to after the block. Dense layers stay.
    Raises ValueError if no MoE layer would be left.
    """
    model, layers, drop = calibration.model, calibration.model.moe_layers, int(how.dropped)
    if drop >= len(layers):
        raise ValueError(
            f"dropped={drop} moe_blocks must lie between 0 and {len(layers) - 1}: the model has {len(layers)} layers with experts"
        )
    read = tuple(calibration.counted(i, ("cos_block",), "trim=moe_blocks") for i in layers)
    chosen = choose_moe_blocks(read, layers=layers, drop=drop)
    thinner = {i: without_moe_block(model.essential, model.layers[i], chosen, layer=i) for i in layers}
    return model.with_layers(thinner, (chosen,))


def block_drop(calibration: Calibration, how: Trimming) -> Model:
    """Build the graph of the model with fewer decoder layers, renumbered (section 4.3, Block Drop).

    Those go that change the direction of the hidden states least, on the recorded tokens of a calibration with `between=True`.
    Dense layers at the beginning stay. The result is an ordinary model of the family. Raises ValueError if the configuration would
    depend on which layers are left.
    """
    model, count, drop = calibration.model, len(calibration.model.layers), int(how.dropped)
    moe = Family.of(model.config).moe_layers
    if drop >= len(moe):
        raise ValueError(
            f"dropped={drop} decoder_layers must lie between 0 and {len(moe) - 1}: the model has {len(moe)} layers that may go"
        )
    if not drop:
        return model
    calibration.check_states("trim=decoder_layers")
    if not calibration.between:
        raise ValueError("Block Drop compares hidden states across layers: calibrate with between=True")
    if model.extra:
        raise ValueError(
            "multi-token-prediction layers stand behind the last decoder layer by its number, under which alone transformers loads "
            "them, so no decoder layer can go; take mtp='drop'"
        )
    first, together = moe[0], how.rule == "consecutive"
    config = with_fewer_layers(Family.of(family_config(model.config)), drop, together=together)
    chosen = choose_decoder_layers(
        tuple(calibration.between),
        tuple(end.part(HIDDEN) for end in calibration.ends),
        first=first, drop=drop, rule=how.rule, tokens=calibration.recorded,
    )  # fmt: skip
    _check_alike(model, first, drop if together else 1)
    # a layer and the one `drop` behind it are alike; those between them may not be, and come here only if each goes by itself
    gap = drop if together and not _alike(model.layers[first:]) else 1
    moved = [
        renumber(chosen, model.layers[i : i + drop + 1 : gap], config=config, first=i, to=i) for i in range(first, count - drop)
    ]
    rest = rewrite.configured(model.rest, config=config)
    return replace(model, config=config, rest=rest, layers=(*model.layers[:first], *moved), choices=(*model.choices, chosen))


def _check_alike(model: Model, first: int, step: int) -> None:
    """Raise ValueError if a layer from `first` on has not the tensors, outside its MoE block, of the one `step` behind it."""
    for i in range(first, len(model.layers) - step):
        if not _alike((model.layers[i], model.layers[i + step])):
            raise ValueError(
                f"layers {i} and {i + step} have other tensors outside their MoE blocks: a layer cannot take another's place; drop "
                "MoE blocks (Layer Drop) instead"
            )


def _alike(layers: Sequence[Step]) -> bool:
    """Whether these layers have the same tensors outside their MoE blocks and the norms before them, which may be gone."""
    tables = []
    for spec in (layer.spec.output for layer in layers):
        family = Family.of(spec.config)
        prefix, block = family.prefix(spec.layer), (family.moe(spec.layer), family.norm(spec.layer))
        tables.append({n.removeprefix(prefix): t for n, t in spec.tensors.items() if not n.startswith(block)})
    return all(table == tables[0] for table in tables)


@dataclass(frozen=True)
class TrimKind:
    """One row of the table of what can be taken out."""

    graph: Callable[[Calibration, Trimming], Model]
    needs: Mapping[str, bool]
    """What it reads from a calibration, as switches of `calibrate.run`."""


TRIM_KINDS = {
    "experts": TrimKind(expert_drop, {"inputs": False}),
    "moe_blocks": TrimKind(layer_drop, {"inputs": False}),
    "decoder_layers": TrimKind(block_drop, {"inputs": False, "between": True}),
}
"""The values of `Trimming.what`; none reads the inputs of MoE blocks."""


def _scores_spec(
    rest: RestSpec, layer_spec: LayerSpec, observed: tuple[ObservedSpec, ...], *, layer: int, criterion: str, seed: int, dtype: str
) -> Spec:
    layer_spec.check_routing("drop experts")
    weights = layer_spec.nbytes if DROP_SCORES[criterion].weights else layer_spec.headers
    writes = 60 + 26 * layer_spec.experts
    reads = weights + len(observed) * (1400 + 8 * 8 * layer_spec.experts)
    out = {"layer": layer, "bytes": writes, "experts": layer_spec.experts}
    done = 2 * layer_spec.expert_numel if DROP_SCORES[criterion].weights else 0
    return Spec(out, reads=reads, writes=writes, operations={"float32": done}, memory=3 * weights + (1 << 28))


@step("trim.scores", version=1, spec=_scores_spec)
def expert_scores(
    context: Context, config: Artifact, layer_files: Artifact, observed: tuple[Artifact, ...],
    *, layer: int, criterion: str, seed: int, dtype: str,
) -> None:  # fmt: skip
    """The score of each expert of one layer by the row `criterion` of `DROP_SCORES`, as `scores.json`; the lowest go first.

    `observed`: what each shard of tokens recorded in this layer.
    """
    from moeflow.methods.recorded import layer_of, needed
    from moeflow.model.checkpoint import Tensors

    score = DROP_SCORES[criterion]
    moe = layer_of(Tensors(layer_files), read_config(config), layer, dtype) if score.weights else None
    score_E = load(score.code)(moe, needed(observed, score.needs), seed + layer)
    value = {"layer": layer, "criterion": criterion, "scores": score_E.double().tolist()}
    (context.out / SCORED).write_text(json.dumps(value) + "\n")


def _choose_experts_spec(
    scores: tuple[Any, ...], prediction: tuple[Any, ...] = (), *, across: str, keep: int, least: int, groups: int
) -> Spec:
    total = sum(s["experts"] for s in scores)
    if across == "model" and keep < least * len(scores):
        raise ValueError(f"{keep} experts are to stay in all, fewer than least={least} in each of {len(scores)} layers; drop fewer")
    stay = keep * len(scores) if across == "layer" else keep
    writes = 300 + 40 * (total + sum(s["experts"] for s in prediction))
    out = {"keep": keep if across == "layer" else None, "least": least, "share": stay / max(1, total), "bytes": writes}
    return Spec(out, reads=sum(s["bytes"] for s in (*scores, *prediction)), writes=writes)


@step("trim.experts", version=2, spec=_choose_experts_spec)
def choose_experts(
    context: Context, scores: tuple[Artifact, ...], prediction: tuple[Artifact, ...] = (),
    *, across: Literal["model", "layer"], keep: int, least: int, groups: int,
) -> None:  # fmt: skip
    """Choose the experts that stay, those with the highest scores (section 4.1); writes `trim.json`.

    Across the "model", `keep` experts stay in total and at least `least` in each layer; across the "layer", `keep` stay in each. If
    a router has groups, whose sizes must stay equal, the lowest experts of all groups go together, by their mean score. Prediction
    layers, whose scores are `prediction`, keep their highest, as many as the layer that keeps most. Raises ValueError if an earlier
    step has left fewer than should stay.
    """
    read, behind = ([read_json(s, SCORED) for s in some] for some in (scores, prediction))
    by_layer = {s["layer"]: s["scores"] for s in read}
    sets = {layer: sets_of(values, groups) for layer, values in by_layer.items()}
    if across == "layer":
        gone = Counter({layer: len(ranked) - keep // groups for layer, ranked in sets.items()})
    else:
        order = sorted((score, layer) for layer, ranked in sets.items() for score, _ in ranked[: len(ranked) - least // groups])
        drop = sum(map(len, by_layer.values())) - keep
        if not 0 <= drop <= len(order) * groups:
            raise ValueError(f"{keep} experts are to stay in all, and a run before has left {drop + keep}; keep fewer")
        gone = Counter(layer for _, layer in order[: drop // groups])  # a layer's sets are sorted by score
    most = max(len(ranked) - gone[layer] for layer, ranked in sets.items())
    by_layer |= {s["layer"]: s["scores"] for s in behind}
    sets |= {s["layer"]: sets_of(s["scores"], groups) for s in behind}
    gone |= Counter({s["layer"]: len(sets[s["layer"]]) - most for s in behind})
    stay = {layer: sorted(e for _, experts in ranked[gone[layer] :] for e in experts) for layer, ranked in sets.items()}
    others = {layer: [e for e in range(len(by_layer[layer])) if e not in kept] for layer, kept in stay.items()}
    rounded = {layer: [round(v, 8) for v in values] for layer, values in by_layer.items()}
    TrimmedExperts("experts", read[0]["criterion"], stay, others, rounded).write(context.out)


def _choose_moe_blocks_spec(observed: tuple[tuple[ObservedSpec, ...], ...], *, layers: list[int], drop: int) -> Spec:
    writes = 200 + 40 * len(layers)
    return Spec({"share": 1 - drop / len(layers), "bytes": writes}, reads=sum(map(len, observed)) * 1500, writes=writes)


@step("trim.moe_blocks", version=1, spec=_choose_moe_blocks_spec)
def choose_moe_blocks(context: Context, observed: tuple[tuple[Artifact, ...], ...], *, layers: list[int], drop: int) -> None:
    """Choose the layers whose MoE block and norm turn the residual stream least, by mean cosine over all tokens (section 4.2).

    `observed`: for each of `layers`, what every shard recorded in it. Raises ValueError if an earlier step has left fewer MoE
    blocks than should go.
    """
    from moeflow.model.checkpoint import Tensors

    similarity = {}
    for layer, shards in zip(layers, observed, strict=True):
        parts = [Tensors(shard) for shard in shards]
        if all("cos_block" in p for p in parts):  # otherwise its block has gone already
            similarity[layer] = float(sum(p["cos_block"] for p in parts) / sum(p["tokens"] for p in parts))
    if drop > len(similarity):
        raise ValueError(f"dropped={drop} MoE blocks are to go, and a run before has left {len(similarity)}; drop fewer")
    order = sorted(similarity, key=lambda i: (-similarity[i], -i))
    TrimmedLayers("moe_blocks", sorted(order[:drop]), similarity, "discrete", gap=1).write(context.out)


def _choose_decoder_layers_spec(
    before: tuple[tuple[ObservedSpec, ...], ...], behind: tuple[Any, ...], *, first: int, drop: int, rule: str, tokens: int
) -> Spec:
    ends = [b.hidden if isinstance(b, ObservedSpec) else b for b in behind]
    each = max(min(tokens, s.sequences * s.length) * int(s.config["hidden_size"]) * 4 for s in ends)
    gap = drop if rule == "consecutive" else 1
    writes = 300 + 40 * len(before)
    memory = (gap + 3) * each + 2 * max(s.nbytes for s in ends) + (1 << 27)
    return Spec({"bytes": writes}, reads=sum(map(len, before)) * each + sum(s.nbytes for s in ends), writes=writes, memory=memory)


@step("trim.decoder_layers", version=1, spec=_choose_decoder_layers_spec)
def choose_decoder_layers(
    context: Context, before: tuple[tuple[Artifact, ...], ...], behind: tuple[Artifact, ...],
    *, first: int, drop: int, rule: Literal["discrete", "consecutive"], tokens: int,
) -> None:  # fmt: skip
    """Choose the `drop` decoder layers with the highest mean cosine over tokens, among those numbered `first` and higher.

    Section 4.3. "discrete": each layer by the cosine between its input and its output; "consecutive": runs of `drop` adjacent
    layers by the cosine between the input of the first and the output of the last. `before`: for each layer its inputs, shard by
    shard; `behind`: the outputs of the last layer, shard by shard. The first `tokens` of each are compared.
    """
    from moeflow.methods.trim.similarity import across

    gap = drop if rule == "consecutive" else 1
    similarity = across((*before, behind), gap=gap, tokens=tokens, progress=context.progress)
    order = sorted(range(first, len(similarity)), key=lambda i: (-similarity[i], -i))
    gone = sorted(order[:drop]) if rule == "discrete" else list(range(order[0], order[0] + drop))
    TrimmedLayers("decoder_layers", gone, dict(enumerate(similarity)), rule, gap).write(context.out)


def _without_moe_block_spec(rest: RestSpec, before: LayerSpec, chosen: Any, *, layer: int) -> Spec:
    out = replace(before, share=before.share * chosen["share"], fewest=0)
    return Spec(out, reads=before.nbytes, writes=before.nbytes, memory=2 * before.nbytes)


@step("trim.without_moe_block", version=1, spec=_without_moe_block_spec)
def without_moe_block(context: Context, config: Artifact, layer_files: Artifact, chosen: Artifact, *, layer: int) -> None:
    """One layer's files, without its MoE block and the norm before it if that was chosen."""
    if layer not in TrimmedLayers.read(chosen).drop:
        rewrite.link_all(context, layer_files)
        return
    _take_block(context, config, layer_files, layer, "trim.without_moe_block")


def _gone_spec(rest: RestSpec, before: LayerSpec, *, layer: int) -> Spec:
    names = names_without_experts(before.tensors, before.config, layer, whole=True)
    out = replace(before, experts=0, tensors={n: before.tensors[n] for n in names}, elsewhere=False)
    return Spec(out, reads=before.headers + out.nbytes, writes=out.nbytes, memory=2 * out.nbytes)


@step("trim.gone", version=1, spec=_gone_spec)
def gone(context: Context, config: Artifact, layer_files: Artifact, *, layer: int) -> None:
    """One layer's files without its MoE block and the norm before it, as an alternative to be measured."""
    _take_block(context, config, layer_files, layer, "trim.gone")


def _take_block(context: Context, config: Artifact, layer_files: Artifact, layer: int, step: str) -> None:
    tensors = headers(layer_files)
    names = names_without_experts(tensors, read_config(config), layer, whole=True)
    rewrite.rewrite(context, layer_files, tensors, {n: (n, False) for n in names}, [])
    Facts.of(layer_files).and_then(step).write(context.out)


def _renumber_spec(chosen: Any, candidates: tuple[LayerSpec, ...], *, config: Config, first: int, to: int) -> Spec:
    family = Family.of(config)
    tables = [{family.prefix(to) + n.removeprefix(family.prefix(c.layer)): t for n, t in c.tensors.items()} for c in candidates]
    largest = max(range(len(candidates)), key=lambda i: candidates[i].nbytes)
    biggest, share = candidates[largest], candidates[largest].share
    if any(t != tables[0] for t in tables) or any(c.share != share for c in candidates):
        average = sum(c.expert_bytes * c.share for c in candidates) / len(candidates)
        share = min(average / max(1, biggest.expert_bytes), 0.999)
    fewest = min(c.least for c in candidates)
    stays = any(c.elsewhere for c in candidates)
    out = replace(biggest, config=config, layer=to, tensors=tables[largest], share=share, fewest=fewest, elsewhere=stays)
    return Spec(out, reads=biggest.nbytes, writes=out.nbytes, memory=2 * biggest.nbytes)


@step("trim.renumber", version=2, spec=_renumber_spec)
def renumber(context: Context, chosen: Artifact, candidates: tuple[Artifact, ...], *, config: Config, first: int, to: int) -> None:
    """The files of layer `to` of the shorter model: those of the old layer that takes this place, under its new number.

    `candidates`: the layers that may take the place: the old layer `first` and those behind it, or it and the last of those alone.
    """
    from moeflow.model import checkpoint

    drop = TrimmedLayers.read(chosen).drop
    old = [i for i in range(to + len(drop) + 1) if i not in drop][to]
    layer_files = candidates[(old - first) * (len(candidates) - 1) // len(drop)]
    if old == to:
        rewrite.link_all(context, layer_files)
        return
    prefix = {n: Family.of(config).prefix(n) for n in (old, to)}
    for name in (n for n in layer_files.names() if n.endswith(".safetensors")):
        tensors = {n: t for n, t in headers(layer_files).items() if t.file == name}
        read = checkpoint.read_many(layer_files, tensors)
        checkpoint.save({prefix[to] + n.removeprefix(prefix[old]): t for n, t in read}, context.out / name)
    Facts.of(layer_files).and_then("trim.renumber", **{"from": old, "to": to}).write(context.out)
