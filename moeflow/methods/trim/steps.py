"""Expert Trimming: a model with fewer experts, without the MoE blocks of some layers, or without whole decoder layers.

He et al., Demystifying the Compression of Mixture-of-Experts Through a Unified Framework (arXiv 2406.02500), section 4. One step
decides what goes, from what the calibration recorded, and leaves a `trim.json`; others take it out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moeflow.arch import Config, Family
from moeflow.methods.graph import HIDDEN, Calibration, Model
from moeflow.methods.records import CRITERIA, TRIM, read_trim, readable
from moeflow.methods.rewrite import configured, link_all, rewrite
from moeflow.model.formats import family_config
from moeflow.model.layout import headers, kept, left, read_config
from moeflow.model.spec import LayerSpec, ObservedSpec, RestSpec
from moeflow.step import Artifact, Context, Spec, step

SCORES = "scores.json"
ACROSS = ("model", "layer")


def expert_drop(
    calibration: Calibration, *, keep: float, across: str = "model", criterion: str = "router_score", least: int = 0, seed: int = 0
) -> Model:
    """The model without the experts of the lowest score, as a graph (section 4.1, Expert Drop).

    `keep`: experts a layer keeps, on average where they are ranked `across` the "model", each where across its "layer";
    `criterion`: "router_score", the router's mean score as the authors take it of each family, or another of
    `moeflow.methods.scores`; `least`: how many stay in every layer. Where fewer than top-k stay a token gets those; a layer that
    loses all keeps its shared expert, or nothing. Raises ValueError for what a router cannot do with.
    """

    model = calibration.model
    family, layers = Family.of(model.config), model.moe_layers
    experts = {i: model.layers[i].spec.output.experts for i in layers}
    if across not in ACROSS:
        raise ValueError(f"across={across!r} is not known; choose one of {', '.join(ACROSS)}")
    if across == "layer" and keep != int(keep):
        raise ValueError(f"keep={keep} experts of each layer is no whole number; rank them across='model' for an average")
    average = sum(experts.values()) / max(1, len(layers))
    if not 0 <= keep <= average:
        raise ValueError(f"keep={keep} experts a layer must lie between 0 and the {average:g} that there are")
    if round(keep * len(layers)) < 1:
        raise ValueError(f"keep={keep} experts of {len(layers)} layers are none; at least one layer has to keep some")
    scores = {
        i: expert_scores(
            model.essential,
            model.layers[i],
            *calibration.observed[i],
            layer=i,
            criterion=criterion,
            seed=seed,
            dtype=calibration.dtype,
        )
        for i in layers
    }
    groups, _ = family.group_limit
    common: dict[str, Any] = {"layers": layers, "groups": groups}
    if across == "layer":
        for i in layers if keep else ():
            family.check_left(int(keep), model.layers[i].spec.output.least)
        chosen = in_layers(*scores.values(), keep=int(keep), **common)
        kept = {i: int(keep) for i in layers}
    else:
        most = min(experts.values())
        legal = next(n for n in range(1, most + 1) if _may_keep(family, n, most))
        # what lies between none and the fewest that a router can do with is not to be had step by step
        least = max(least, legal if legal > groups else 0)
        total = -(-round(keep * len(layers)) // groups) * groups
        chosen = in_model(*scores.values(), keep=total, least=least, **common)
        kept = dict.fromkeys(layers, -1)
    dropped = {i: take_out_experts(model.essential, model.layers[i], chosen, layer=i, keep=kept[i], least=least) for i in layers}
    return model.with_layers(dropped, (chosen,))


def layer_drop(calibration: Calibration, *, drop: int) -> Model:
    """The model without the MoE blocks, and the norms before them, of `drop` layers, as a graph (section 4.2, Layer Drop).

    Those go that turn the residual stream least: of the highest mean cosine between it before and after norm and block, over all
    calibration tokens. Dense layers keep theirs. Raises ValueError where there are not more MoE layers than that.
    """
    model, layers = calibration.model, calibration.model.moe_layers
    if not 0 <= drop < len(layers):
        raise ValueError(f"drop={drop} must lie between 0 and {len(layers) - 1}: the model has {len(layers)} layers with experts")
    seen = [part for i in layers for part in calibration.observed[i]]
    chosen = choose_moe_blocks(*seen, layers=layers, drop=drop)
    cut = {i: moe(model.essential, model.layers[i], chosen, layer=i) for i in layers}
    return model.with_layers(cut, (chosen,))


def block_drop(calibration: Calibration, *, drop: int, rule: str = "consecutive") -> Model:
    """The model with `drop` decoder layers fewer, renumbered, as a graph (section 4.3, Block Drop).

    `rule`: "discrete", the layers of the highest mean cosine between the hidden states before and behind one layer; "consecutive",
    the adjacent ones with the highest across all of them. Cosines are of the recorded tokens of a calibration with `between=True`.
    Dense layers at the beginning stay. The result is the family's own kind of model. Raises ValueError where the layers that
    are left would need another configuration according to which they are.
    """
    model, count = calibration.model, len(calibration.model.layers)
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not known; choose one of {', '.join(RULES)}")
    moe = Family.of(model.config).moe_layers
    if not 0 <= drop < len(moe):
        raise ValueError(f"drop={drop} must lie between 0 and {len(moe) - 1}: the model has {len(moe)} layers that may go")
    if not drop:
        return model
    if not calibration.between:
        raise ValueError("Block Drop compares hidden states across layers: calibrate with between=True")
    config, first = _shorter(model, moe, drop), moe[0]
    seen = [part for parts in calibration.between for part in parts]
    chosen = choose_layers(
        *seen,
        *(end.part(HIDDEN) for end in calibration.ends),
        layers=count,
        first=first,
        drop=drop,
        rule=rule,
        tokens=calibration.recorded,
    )
    kept = [
        renumbered(chosen, *model.layers[i : i + drop + 1], config=config, first=i, to=i) if i >= first else model.layers[i]
        for i in range(count - drop)
    ]
    rest = configured(model.rest, config=config)
    return replace(model, config=config, rest=rest, layers=tuple(kept), choices=(*model.choices, chosen))


def _may_keep(family: Family, keep: int, experts: int) -> bool:
    try:
        family.check_left(keep, experts)
    except ValueError:
        return False
    return True


def _shorter(model: Model, moe: list[int], drop: int) -> Config:
    """The configuration of the model with `drop` decoder layers fewer, whichever they are."""
    config, count = family_config(model.config), len(model.layers)
    if model.extra:
        raise ValueError("multi-token-prediction layers stand behind the last layer by its number; fetch the model with mtp='drop'")
    if config.get("use_sliding_window") and 0 < int(config.get("max_window_layers") or 0) < count:
        raise ValueError(
            f"max_window_layers={config['max_window_layers']}: attention differs by layer; a layer cannot take another's place"
        )
    shorter = config | {"num_hidden_layers": count - drop}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == count and name != "mlp_only_layers":
            if any(v != value[0] for v in value):
                raise ValueError(
                    f"{name} differs by layer: a layer cannot take another's place; drop MoE blocks (Layer Drop) instead"
                )
            shorter[name] = value[: count - drop]
    if Family.of(shorter).moe_layers != list(range(moe[0], count - drop)):
        raise ValueError(
            f"layers {[i for i in range(moe[0], count) if i not in moe]} have no experts, and config.json tells them by number: "
            "another layer cannot take their place; drop MoE blocks (Layer Drop) instead"
        )
    return shorter


RULES = ("discrete", "consecutive")


def _scores_spec(rest: RestSpec, given: LayerSpec, *seen: ObservedSpec, layer: int, criterion: str, seed: int, dtype: str) -> Spec:
    given.check_routing("drop experts")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion={criterion!r} is not known; choose one of {', '.join(CRITERIA)}")
    weights = given.nbytes if criterion in ("aimer", "random") else given.headers
    writes = 60 + 26 * given.experts
    reads = weights + len(seen) * (1400 + 8 * 8 * given.experts)
    return Spec(
        {"layer": layer, "bytes": writes, "experts": given.experts}, reads=reads, writes=writes, memory=3 * weights + (1 << 28)
    )


@step("trim.scores", version=1, spec=_scores_spec)
def expert_scores(
    context: Context, config: Artifact, given: Artifact, *seen: Artifact, layer: int, criterion: str, seed: int, dtype: str
) -> None:
    """The score of each expert of one layer, as `scores.json`; those of the lowest go first.

    "router_score" is the mean over tokens of the router's score of an expert, or, in the families where the authors' code does so,
    of its routing weight where it is chosen and zero elsewhere.
    """
    from moeflow.methods.recorded import add_stats, layer_of
    from moeflow.methods.scores import SCORES as ways
    from moeflow.model.checkpoint import Tensors

    read = read_config(config)
    stats = add_stats([Tensors(s) for s in seen])
    if criterion == "router_score" and Family.of(read).arch.drop_score == "chosen":
        score_E = stats["weight_E"] / stats["tokens"]
    else:
        weights = criterion in ("aimer", "random")
        moe: Any = layer_of(Tensors(given), read, layer, dtype) if weights else None
        score_E = ways[criterion](moe, stats, seed + layer)
    value = {"layer": layer, "criterion": criterion, "scores": score_E.double().tolist()}
    (context.out / SCORES).write_text(json.dumps(value) + "\n")


def _in_layers_spec(*given: Any, layers: list[int], groups: int, keep: int) -> Spec:
    return _chosen_experts_spec(given, sum(g["experts"] - keep for g in given))


@step("trim.in_layers", version=1, spec=_in_layers_spec)
def in_layers(context: Context, *given: Artifact, layers: list[int], groups: int, keep: int) -> None:
    """The `keep` experts of the highest score in each layer, as many of each group of its router (section 4.1, layer-wise)."""
    by_layer = dict(zip(layers, map(_read_scores, given), strict=True))
    kept = {}
    for layer, values in by_layer.items():
        units = _units(values, groups)
        kept[layer] = sorted(e for _, experts in units[len(units) - keep // groups :] for e in experts)
    _write_experts(context, by_layer, kept)


def _in_model_spec(*given: Any, layers: list[int], groups: int, keep: int, least: int) -> Spec:
    if keep < least * len(given):
        raise ValueError(f"{keep} experts are to stay in all, fewer than least={least} in each of {len(given)} layers; keep more")
    return _chosen_experts_spec(given, sum(g["experts"] for g in given) - keep)


@step("trim.in_model", version=1, spec=_in_model_spec)
def in_model(context: Context, *given: Artifact, layers: list[int], groups: int, keep: int, least: int) -> None:
    """The `keep` experts of the highest score of all layers together, `least` of them in each (section 4.1, global).

    Where a router ranks its experts in groups, which must stay of one size, the lowest of every group go together, by their mean.
    Raises ValueError where a run before this one has left fewer than are to stay.
    """
    by_layer = dict(zip(layers, map(_read_scores, given), strict=True))
    units = {layer: _units(values, groups) for layer, values in by_layer.items()}
    order = sorted(
        (score, layer, at) for layer, found in units.items() for at, (score, _) in enumerate(found[: len(found) - least // groups])
    )
    drop = sum(map(len, by_layer.values())) - keep
    if not 0 <= drop <= len(order) * groups:
        raise ValueError(f"{keep} experts are to stay in all, and a run before has left {drop + keep}; keep fewer")
    gone = {layer: 0 for layer in layers}
    for _, layer, _ in order[: drop // groups]:
        gone[layer] += 1  # a layer's units stand in the order of their scores
    kept = {layer: sorted(e for _, experts in found[gone[layer] :] for e in experts) for layer, found in units.items()}
    _write_experts(context, by_layer, kept)


def _units(values: Sequence[float], groups: int) -> list[tuple[float, list[int]]]:
    """What can go together from a layer, lowest first, the higher number first where scores are equal: one expert of each group."""
    size = len(values) // groups
    ranked = [sorted(range(g * size, (g + 1) * size), key=lambda e: (values[e], -e)) for g in range(groups)]
    return [(sum(values[e] for e in experts) / groups, list(experts)) for experts in zip(*ranked, strict=True)]


def _chosen_experts_spec(given: Sequence[Any], drop: int) -> Spec:
    total = sum(g["experts"] for g in given)
    writes = 300 + 40 * total
    out = {"trim": "experts", "share": 1 - drop / max(1, total), "bytes": writes}
    return Spec(out, reads=sum(g["bytes"] for g in given), writes=writes)


def _write_experts(context: Context, scores: Mapping[int, Sequence[float]], kept: Mapping[int, Sequence[int]]) -> None:
    gone = {i: [e for e in range(len(scores[i])) if e not in kept[i]] for i in kept}
    _write_trim(context, "experts", keep=kept, drop=gone, scores={i: [round(v, 8) for v in values] for i, values in scores.items()})


def _choose_moe_blocks_spec(*seen: ObservedSpec, layers: list[int], drop: int) -> Spec:
    writes = 200 + 40 * len(layers)
    return Spec({"trim": "moe", "share": 1 - drop / len(layers), "bytes": writes}, reads=len(seen) * 1500, writes=writes)


@step("trim.choose_moe_blocks", version=1, spec=_choose_moe_blocks_spec)
def choose_moe_blocks(context: Context, *seen: Artifact, layers: list[int], drop: int) -> None:
    """The layers whose MoE block and norm turn the residual stream least, by the mean cosine over all tokens (section 4.2).

    `seen`: what every shard recorded in the first of `layers`, then in the next. Raises ValueError where a run before this one has
    left fewer MoE blocks than are to go.
    """
    from moeflow.model.checkpoint import Tensors

    shards = len(seen) // len(layers)
    similarity = {}
    for at, layer in enumerate(layers):
        parts = [Tensors(s) for s in seen[at * shards : (at + 1) * shards]]
        if all("cos_block" in p for p in parts):  # otherwise its block has gone already
            similarity[layer] = float(sum(p["cos_block"] for p in parts) / sum(p["tokens"] for p in parts))
    if drop > len(similarity):
        raise ValueError(f"drop={drop} MoE blocks are to go, and a run before has left {len(similarity)}; drop fewer")
    order = sorted(similarity, key=lambda i: (-similarity[i], -i))
    _write_trim(context, "moe", drop=sorted(order[:drop]), similarity=similarity)


def _choose_layers_spec(*seen: Any, layers: int, first: int, drop: int, rule: str, tokens: int) -> Spec:
    states = [s.hidden for s in seen if isinstance(s, ObservedSpec)]
    each = max(min(tokens, s.sequences * s.length) * int(s.config["hidden_size"]) * 4 for s in states)
    gap = drop if rule == "consecutive" else 1
    shards = len(seen) // (layers + 1)
    writes = 300 + 40 * layers
    reads = layers * shards * each + sum(s.nbytes for s in states[-shards:])
    memory = (gap + 3) * each + 2 * max(s.nbytes for s in states) + (1 << 27)
    return Spec({"trim": "layers", "bytes": writes}, reads=reads, writes=writes, memory=memory)


@step("trim.choose_decoder_layers", version=1, spec=_choose_layers_spec)
def choose_layers(context: Context, *seen: Artifact, layers: int, first: int, drop: int, rule: str, tokens: int) -> None:
    """The `drop` decoder layers from `first` on that turn the hidden states least, by mean cosine over tokens (section 4.3).

    "discrete": each layer by the cosine between the states before and behind it; "consecutive": adjacent layers by that across
    all of them. `seen`: the states of every shard before each of `layers`, layer after layer, and then behind the last; of these
    `tokens` are compared.
    """

    from moeflow.methods.trim.similarity import across

    gap = drop if rule == "consecutive" else 1
    similarity = across(seen, layers=layers, gap=gap, tokens=tokens, progress=context.progress)
    order = sorted(range(first, layers - gap + 1), key=lambda i: (-similarity[i], -i))
    gone = sorted(order[:drop]) if rule == "discrete" else list(range(order[0], order[0] + drop))
    kept = [i for i in range(layers) if i not in gone]
    _write_trim(context, "layers", rule=rule, drop=gone, keep=kept, gap=gap, similarity=dict(enumerate(similarity)))


def _read_scores(artifact: Artifact) -> list[float]:
    return json.loads(artifact.read(SCORES, 0, artifact.size(SCORES)))["scores"]


def _write_trim(context: Context, what: str, **facts: Any) -> None:
    plain = {n: {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value for n, value in facts.items()}
    (context.out / TRIM).write_text(readable({"trim": what} | plain))


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
    fewest = min(least, given.least) if keep < 0 else None
    out = replace(given, config=rest.config, experts=most, tensors=table, share=share, fewest=fewest)
    return Spec(out, reads=out.nbytes, writes=out.nbytes, memory=2 * out.nbytes)


@step("trim.experts", version=1, spec=_experts_spec)
def take_out_experts(
    context: Context, config: Artifact, given: Artifact, chosen: Artifact, *, layer: int, keep: int, least: int
) -> None:
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


@step("trim.moe_block", version=1, spec=_moe_spec)
def moe(context: Context, config: Artifact, given: Artifact, chosen: Artifact, *, layer: int) -> None:
    """One layer's file, without its MoE block and the norm before it where that was chosen."""
    if layer not in read_trim(chosen)["drop"]:
        link_all(context, given)
        return
    tensors = headers(given)
    kept_names = left(tensors, read_config(config), layer, whole=True)
    rewrite(context, given, tensors, {n: (n, False) for n in kept_names}, [])


def _renumbered_spec(chosen: Any, *candidates: LayerSpec, config: Config, first: int, to: int) -> Spec:
    family = Family.of(config)
    tables = [{family.prefix(to) + n.removeprefix(family.prefix(c.layer)): t for n, t in c.tensors.items()} for c in candidates]
    largest = max(range(len(candidates)), key=lambda i: candidates[i].nbytes)
    given, share = candidates[largest], candidates[largest].share
    if any(t != tables[0] for t in tables) or any(c.share != share for c in candidates):
        average = sum(c.expert_bytes * c.share for c in candidates) / len(candidates)
        share = min(average / max(1, given.expert_bytes), 0.999)
    fewest = min(c.least for c in candidates)
    out = replace(given, config=config, layer=to, tensors=tables[largest], share=share, fewest=fewest)
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
    prefix = {n: Family.of(config).prefix(n) for n in (old, to)}
    for name in given.names():
        if name.endswith(".safetensors"):
            tensors = {n: t for n, t in headers(given).items() if t.file == name}
            read = checkpoint.read_many(given, tensors)
            checkpoint.save({prefix[to] + n.removeprefix(prefix[old]): t for n, t in read}, context.out / name)
        else:  # what was told of the layer, under its number
            value = json.loads(given.read(name, 0, given.size(name)))
            (context.out / name).write_text(json.dumps(value | {"layer": to} if "layer" in value else value) + "\n")
