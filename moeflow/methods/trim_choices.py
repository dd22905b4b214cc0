"""What trimming takes out, each decision as a `trim.json` that a person can read and diff: experts by their scores, MoE blocks and
decoder layers by how little they turn the hidden states.

He et al., arXiv 2406.02500, section 4. Shapes are suffixes: R recorded tokens, D model width, E experts.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moeflow.arch import arch_of
from moeflow.methods.choose import CRITERIA, readable
from moeflow.model.layout import read_config
from moeflow.model.spec import LayerSpec, ObservedSpec, RestSpec
from moeflow.step import Artifact, Context, Spec, step

TRIM, SCORES = "trim.json", "scores.json"
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
def scores(
    context: Context, config: Artifact, given: Artifact, *seen: Artifact, layer: int, criterion: str, seed: int, dtype: str
) -> None:
    """The score of each expert of one layer, as `scores.json`; those of the lowest go first.

    "router_score" is the mean over tokens of the router's score of an expert, or, in the families where the authors' code does so,
    of its routing weight where it is chosen and zero elsewhere.
    """
    from moeflow.methods.criteria import SCORES as ways
    from moeflow.methods.weigh import add_stats, layer_of
    from moeflow.model.checkpoint import Tensors

    read = read_config(config)
    stats = add_stats([Tensors(s) for s in seen])
    if criterion == "router_score" and arch_of(read).drop_score == "chosen":
        score_E = stats["weight_E"] / stats["tokens"]
    else:
        weights = criterion in ("aimer", "random")
        moe: Any = layer_of(Tensors(given), read, layer, dtype) if weights else None
        score_E = ways[criterion](moe, stats, seed + layer)
    value = {"layer": layer, "criterion": criterion, "scores": score_E.double().tolist()}
    (context.out / SCORES).write_text(json.dumps(value) + "\n")


def _in_layers_spec(*given: Any, layers: list[int], groups: int, keep: int) -> Spec:
    return _experts_spec(given, sum(g["experts"] - keep for g in given))


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
    return _experts_spec(given, sum(g["experts"] for g in given) - keep)


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


def _experts_spec(given: Sequence[Any], drop: int) -> Spec:
    total = sum(g["experts"] for g in given)
    writes = 300 + 40 * total
    out = {"trim": "experts", "share": 1 - drop / max(1, total), "bytes": writes}
    return Spec(out, reads=sum(g["bytes"] for g in given), writes=writes)


def _write_experts(context: Context, scores: Mapping[int, Sequence[float]], kept: Mapping[int, Sequence[int]]) -> None:
    gone = {i: [e for e in range(len(scores[i])) if e not in kept[i]] for i in kept}
    _write(context, "experts", keep=kept, drop=gone, scores={i: [round(v, 8) for v in values] for i, values in scores.items()})


def _blocks_spec(*seen: ObservedSpec, layers: list[int], drop: int) -> Spec:
    writes = 200 + 40 * len(layers)
    return Spec({"trim": "moe", "share": 1 - drop / len(layers), "bytes": writes}, reads=len(seen) * 1500, writes=writes)


@step("trim.moe_blocks", version=1, spec=_blocks_spec)
def blocks_of_experts(context: Context, *seen: Artifact, layers: list[int], drop: int) -> None:
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
    _write(context, "moe", drop=sorted(order[:drop]), similarity=similarity)


def _layers_spec(*seen: Any, layers: int, first: int, drop: int, rule: str, tokens: int) -> Spec:
    states = [s.hidden for s in seen if isinstance(s, ObservedSpec)]
    each = max(min(tokens, s.sequences * s.length) * int(s.config["hidden_size"]) * 4 for s in states)
    gap = drop if rule == "consecutive" else 1
    shards = len(seen) // (layers + 1)
    writes = 300 + 40 * layers
    reads = layers * shards * each + sum(s.nbytes for s in states[-shards:])
    memory = (gap + 3) * each + 2 * max(s.nbytes for s in states) + (1 << 27)
    return Spec({"trim": "layers", "bytes": writes}, reads=reads, writes=writes, memory=memory)


@step("trim.layers", version=1, spec=_layers_spec)
def layers(context: Context, *seen: Artifact, layers: int, first: int, drop: int, rule: str, tokens: int) -> None:
    """The `drop` decoder layers from `first` on that turn the hidden states least, by mean cosine over tokens (section 4.3).

    "discrete": each layer by the cosine between the states before and behind it; "consecutive": adjacent layers by that across
    all of them. `seen`: the states of every shard before each of `layers`, layer after layer, and then behind the last; of these
    `tokens` are compared.
    """
    from moeflow.methods.similarity import across

    gap = drop if rule == "consecutive" else 1
    similarity = across(seen, layers=layers, gap=gap, tokens=tokens, progress=context.progress)
    order = sorted(range(first, layers - gap + 1), key=lambda i: (-similarity[i], -i))
    gone = sorted(order[:drop]) if rule == "discrete" else list(range(order[0], order[0] + drop))
    kept = [i for i in range(layers) if i not in gone]
    _write(context, "layers", rule=rule, drop=gone, keep=kept, gap=gap, similarity=dict(enumerate(similarity)))


def read_trim(artifact: Artifact) -> dict[str, Any]:
    """What a step of this module decided."""
    return json.loads(artifact.read(TRIM, 0, artifact.size(TRIM)))


def _read_scores(artifact: Artifact) -> list[float]:
    return json.loads(artifact.read(SCORES, 0, artifact.size(SCORES)))["scores"]


def _write(context: Context, what: str, **facts: Any) -> None:
    plain = {n: {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value for n, value in facts.items()}
    (context.out / TRIM).write_text(readable({"trim": what} | plain))
