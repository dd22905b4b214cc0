"""Pruning: which experts of a layer stay, chosen layer by layer, by counts out of one budget, or in blocks of layers.

NAEE (Lu et al., ACL 2024, arXiv 2402.14800) and MoE-I² (Yang et al., EMNLP Findings 2024, arXiv 2411.01016), section 3.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moeflow.arch import Family
from moeflow.methods.graph import HIDDEN
from moeflow.methods.prune.counts import between, check_total, fit, neighbours, shares
from moeflow.methods.prune.subsets import ENUMERATE, MAX_SUBSETS, check, count_subsets
from moeflow.methods.records import (
    CANDIDATES,
    CHOICE,
    COUNTS,
    CRITERIA,
    read_candidates,
    read_counts,
    read_curves,
    read_importance,
    readable,
    write_importance,
)
from moeflow.model.layout import read_config
from moeflow.model.spec import HiddenSpec, LayerSpec, ObservedSpec, RestSpec, precision
from moeflow.step import Artifact, Context, Spec, step

BLOCK = "block.json"
INPUTS = ("original", "progressive")
MAX_COMBINATIONS = 10_000


def _block_spec(
    rest: RestSpec, *inputs: Any, layers: list[int], searched: list[int], best: int, shards: int, goals: int, batch: int, dtype: str
) -> Spec:
    if best ** len(searched) > MAX_COMBINATIONS:
        raise ValueError(
            f"K={best} sets in each of T={len(searched)} layers are {best ** len(searched):,} combinations, over "
            f"{MAX_COMBINATIONS:,}; lower K or T"
        )
    layer_specs: Sequence[LayerSpec] = inputs[: len(layers)]
    found = inputs[len(layers) : len(layers) + len(searched)]
    states: list[HiddenSpec] = [s.hidden if isinstance(s, ObservedSpec) else s for s in inputs[len(layers) + len(searched) :]]
    reads = shards * sum(layer.nbytes for layer in layer_specs) + sum(c["bytes"] for c in found) + sum(s.nbytes for s in states)
    held = sum(best**t for t in range(max(1, len(searched)))) + 2
    memory = 3 * max(layer.nbytes for layer in layer_specs) + held * max(s.nbytes for s in states)
    writes = 200 + best ** len(searched) * (60 + 8 * len(searched))
    return Spec({"layers": layers, "bytes": writes}, reads=reads, writes=writes, memory=memory)


@step("prune.block", version=1, spec=_block_spec, gpus=1)
def block(
    context: Context, config: Artifact, *inputs: Artifact,
    layers: list[int], searched: list[int], best: int, shards: int, goals: int, batch: int, dtype: str,
) -> None:  # fmt: skip
    """The loss of every combination of the `best` sets of the `searched` among consecutive `layers`, as `block.json`.

    `inputs`: the layers' files, the candidates of the searched ones, the hidden states before the block in `shards` files, and
    where `goals` is not 0 as many files with the original's behind it; otherwise the unpruned layers say what is aimed at.
    """

    from moeflow.methods.prune import reception

    files = [i.file("layer.safetensors") for i in inputs[: len(layers)]]
    at = len(layers) + len(searched)
    found = [read_candidates(i)["counts"] for i in inputs[len(layers) : at]]
    sets = {i: [s["keep"] for s in _only(c)["best"][:best]] for i, c in zip(searched, found, strict=True)}
    losses = reception.losses(
        read_config(config), list(zip(layers, files, strict=True)), sets,
        [h.file(HIDDEN) for h in inputs[at : at + shards]], [h.file(HIDDEN) for h in inputs[at + shards :]],
        batch=batch, dtype=dtype, progress=context.progress,
    )  # fmt: skip
    order = sorted(losses, key=lambda c: losses[c])
    lines = [json.dumps({"sets": list(c), "loss": losses[c]}) for c in order]
    context.note(f"layers {layers}: best combination {list(order[0])} of {len(order)}")
    (context.out / BLOCK).write_text('{"layers": ' + json.dumps(searched) + ', "combinations": [\n' + ",\n".join(lines) + "\n]}\n")


def _pick_spec(found: Any, *deciders: Any, layer: int, keep: int) -> Spec:
    if keep and keep not in found["counts"]:
        raise ValueError(f"the candidates of layer {layer} are for {found['counts']} experts, not for {keep}")
    reads = found["bytes"] + sum(d.get("bytes", 200) for d in deciders)
    share = min((d["share"] for d in deciders if "share" in d), default=1.0)
    return Spec({"layer": layer, "keep": keep, "share": share, "bytes": 1500}, reads=reads, writes=1500)


@step("prune.pick", version=1, spec=_pick_spec)
def pick(context: Context, found: Artifact, *deciders: Artifact, layer: int, keep: int) -> None:
    """One of a layer's candidates, as the `choice.json` that `drop.experts` reads.

    `deciders`: the counts of all layers (where `keep` is 0) and the block that the layer belongs to (where blocks are chosen
    together).
    """
    from moeflow.methods.records import COUNTS, read_counts

    candidates, rank = read_candidates(found), 0
    for decider in deciders:
        if COUNTS in decider.names():
            keep = read_counts(decider)["counts"][str(layer)]
        else:
            chosen = json.loads(decider.read(BLOCK, 0, decider.size(BLOCK)))
            rank = chosen["combinations"][0]["sets"][chosen["layers"].index(layer)]
    entry = candidates["counts"][str(keep)] if keep else _only(candidates["counts"])
    picked, others = entry["best"][rank], [s for i, s in enumerate(entry["best"]) if i != rank]
    choice = {
        "layer": layer,
        "experts": candidates["experts"],
        "keep": picked["keep"],
        "criterion": candidates["method"],
        "loss": {"kind": "frobenius", "value": picked["loss"], "of_output": picked["of_output"], "tokens": candidates["tokens"]},
        "runner_up": others[0] if others else None,
        "baselines": {name: entry["baselines"][name] for name in CRITERIA},
    }
    (context.out / CHOICE).write_text(readable(choice))


def _only(counts: dict[str, Any]) -> Any:
    (entry,) = counts.values()
    return entry


def _counts_spec(*inputs: Any, legal: dict[str, list[int]], experts: dict[str, int], total: int) -> Spec:
    check_total(total, {int(i): counts for i, counts in legal.items()})
    out = {"total": total, "share": total / sum(experts.values())}
    return Spec(out, reads=sum(i["bytes"] for i in inputs), writes=500 + 60 * len(legal))


@step("prune.counts_paper", version=1, spec=_counts_spec)
def counts_paper(
    context: Context, *importances: Artifact, legal: dict[str, list[int]], experts: dict[str, int], total: int
) -> None:
    """Counts by the paper's rule: the more important a layer, the fewer experts it loses (MoE-I², section 3.1), as `counts.json`.

    A layer's importance is the sum of its experts'. The paper leaves open how importance becomes a count: here a layer's share of
    the experts that go is proportional to one over its importance, as far as it has experts to give, rounded to the legal counts
    that add up to `total` with the least squared deviation.
    """
    layers = {i["layer"]: sum(i["importance"]) for i in map(read_importance, importances)}
    least = {i: min(legal[str(i)]) for i in layers}
    inverse = {i: 1 / (v + 1e-12) for i, v in layers.items()}
    gone = shares(inverse, {i: experts[str(i)] - least[i] for i in layers}, sum(experts.values()) - total)
    curves = {i: {n: (experts[str(i)] - gone[i] - n) ** 2 for n in legal[str(i)]} for i in layers}
    _write_counts(context, "paper", fit(curves, total), importance={str(i): v for i, v in layers.items()})


@step("prune.counts_exact", version=1, spec=_counts_spec)
def counts_exact(context: Context, curves: Artifact, *, legal: dict[str, list[int]], experts: dict[str, int], total: int) -> None:
    """The counts that add up to `total` with the least summed cost, by dynamic programming over each layer's measured curve.

    Between measured counts a curve is a straight line; with all of a layer's `experts` it is zero. Beside the choice stand the
    cost of the best other one that moves one step from one layer to another, and of the same count everywhere where that is legal.
    """
    measured = read_curves(curves)["curves"]
    found = {}
    for i, counts in legal.items():
        points = sorted(({int(n): v for n, v in measured.get(i, {}).items()} | {experts[i]: 0.0}).items())
        found[int(i)] = {n: between(points, n) for n in counts}
    chosen = fit(found, total)

    def cost(given: Mapping[int, int]) -> float:
        return sum(found[i][n] for i, n in given.items())

    def entry(given: Mapping[int, int]) -> dict[str, Any]:
        return {"counts": list(given.values()), "cost": cost(given)}

    others = sorted(neighbours(chosen, found), key=cost)
    same = dict.fromkeys(chosen, total // len(chosen))
    everywhere = total == sum(same.values()) and all(n in found[i] for i, n in same.items())
    _write_counts(
        context, "exact", chosen, cost=cost(chosen),
        runner_up=entry(others[0]) if others else None, uniform=entry(same) if everywhere else None,
    )  # fmt: skip


def _write_counts(context: Context, rule: str, counts: Mapping[int, int], **facts: Any) -> None:
    value = {"rule": rule, "total": sum(counts.values()), "counts": {str(i): n for i, n in counts.items()}, **facts}
    (context.out / COUNTS).write_text(json.dumps(value, indent=1) + "\n")


METHODS = {ENUMERATE: (), "genetic": ("population", "generations", "parents", "mutation"), "swap": ("starts",)}
"""Every search over the subsets of one layer, and the options that it takes."""


def _candidates_spec(
    rest: RestSpec, layer_spec: LayerSpec, *inputs: Any,
    layer: int, counts: list[int], decided: bool, method: str, best: int, options: dict[str, Any], protected: list[int],
    seed: int, dtype: str,
) -> Spec:  # fmt: skip
    family = Family.of(rest.config)
    for keep in counts:
        family.check_keep(keep, layer_spec.experts)
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; choose one of {', '.join(METHODS)}")
    if strange := sorted(set(options) - set(METHODS[method])):
        raise ValueError(f"{method} has no option {strange[0]}; it takes {', '.join(METHODS[method]) or 'none'}")
    groups = family.group_limit[0]
    for keep in counts:
        check(layer_spec.experts, keep, groups=groups, protected=protected, best=best, **options)
        count = count_subsets(layer_spec.experts, keep, groups, protected)
        if method == ENUMERATE and count > MAX_SUBSETS:
            raise ValueError(
                f"keeping {keep} of {layer_spec.experts} experts means {count:,} subsets, over {MAX_SUBSETS:,}: enumeration is for "
                "narrow layers; search instead (genetic or swap)"
            )
    seen: list[ObservedSpec] = [s for s in inputs if isinstance(s, ObservedSpec)]
    width, size = int(rest.config["hidden_size"]), 4 if precision(rest.config, dtype) == "float32" else 2
    rows = sum(s.rows for s in seen)
    reads = layer_spec.headers + layer_spec.block_bytes + rows * width * size + len(seen) * (1400 + 7 * 8 * layer_spec.experts)
    sets = (1 if decided else len(counts)) * (best + 6)
    writes = 300 + sets * (70 + 4 * layer_spec.experts)
    out = {"layer": layer, "counts": counts, "experts": layer_spec.experts, "bytes": writes}
    return Spec(out, reads=reads, writes=writes, memory=2 * layer_spec.nbytes + (3 << 30))


@step("prune.candidates", version=1, spec=_candidates_spec, gpus=1)
def candidates(
    context: Context, config: Artifact, layer_file: Artifact, *inputs: Artifact,
    layer: int, counts: list[int], decided: bool, method: str, best: int, options: dict[str, Any], protected: list[int],
    seed: int, dtype: str,
) -> None:  # fmt: skip
    """The `best` sets of one layer's experts for each count, by `method`, with the losses of these and of the baselines.

    `inputs`: where `decided`, first the counts of all layers, one of `counts` for this one; then what each shard of tokens showed
    in this layer. `options` are the method's own; `protected` experts stay. Long searches save their state and go on from it.
    """

    from moeflow.methods.prune.subset_search import search_counts

    first = inputs[0] if decided else None
    shards = inputs[1:] if decided else inputs
    wanted = [read_counts(first)["counts"][str(layer)]] if first else counts
    found = search_counts(
        context, read_config(config), layer_file, shards,
        layer=layer, counts=wanted, method=method, best=best, options=options, protected=protected, seed=seed, dtype=dtype,
    )  # fmt: skip
    (context.out / CANDIDATES).write_text(_readable_candidates(found))


def _readable_candidates(found: dict[str, Any]) -> str:
    """Indented JSON, one line for each set."""
    text = json.dumps(found | {"counts": "@"}, indent=1)
    blocks = []
    for keep, entry in found["counts"].items():
        sets = ",\n".join(f"    {json.dumps(s)}" for s in entry["best"])
        base = ",\n".join(f"    {json.dumps(n)}: {json.dumps(s)}" for n, s in entry["baselines"].items())
        blocks.append(f'  {json.dumps(keep)}: {{\n   "best": [\n{sets}\n   ],\n   "baselines": {{\n{base}\n   }}\n  }}')
    return text.replace('"@"', "{\n" + ",\n".join(blocks) + "\n }") + "\n"


LOSSES = ("frobenius", "batch-sum")


def _choose_spec(
    rest: RestSpec, layer_spec: LayerSpec, *seen: ObservedSpec,
    layer: int, keep: int, criterion: str, loss: str, batch_tokens: int, seed: int, dtype: str, targets: int,
) -> Spec:  # fmt: skip
    config = rest.config
    family = Family.of(config)
    family.check_keep(keep)
    if criterion not in (ENUMERATE, *CRITERIA):
        raise ValueError(f"criterion={criterion!r} is not known; choose one of {', '.join((ENUMERATE, *CRITERIA))}")
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is not known; choose one of {', '.join(LOSSES)}")
    count = count_subsets(layer_spec.experts, keep, family.group_limit[0])
    if criterion == ENUMERATE and count > MAX_SUBSETS:
        raise ValueError(
            f"keeping {keep} of {layer_spec.experts} experts means {count:,} subsets, over {MAX_SUBSETS:,}: enumeration is for "
            "narrow layers; choose by score instead (search=reap)"
        )
    states = [s.hidden for s in seen]
    partial = [s for s, h in zip(seen, states, strict=True) if s.recorded < h.sequences * h.length]
    if loss == "batch-sum" and partial:
        raise ValueError("loss='batch-sum' sums over whole batches and needs the inputs of all tokens: calibrate with record=None")
    width, size = int(config["hidden_size"]), 4 if precision(config, dtype) == "float32" else 2
    rows = sum(s.rows for s in seen)
    reads = layer_spec.headers + layer_spec.block_bytes
    reads += rows * width * size + len(seen) * (1400 + 7 * 8 * layer_spec.experts)
    # the layer twice, the largest shard's inputs and targets twice, and the intermediate tensors of a chunk of tokens in fp64
    memory = 2 * layer_spec.nbytes + 4 * max(s.rows for s in seen) * width * size + (1 << 30)
    writes = 1500 + (count if criterion == ENUMERATE else 0) * (26 + 3 * keep)
    return Spec({"layer": layer, "keep": keep, "bytes": writes}, reads=reads, writes=writes, memory=memory)


@step("prune.choose", version=2, spec=_choose_spec, gpus=1)
def choose(
    context: Context, config_from: Artifact, layer_file: Artifact, *seen: Artifact,
    layer: int, keep: int, criterion: str, loss: str, batch_tokens: int, seed: int, dtype: str, targets: int,
) -> None:  # fmt: skip
    """The experts of one layer that stay, as `choice.json`, with the loss of the choice, of the runner-up and of the baselines.

    `seen`: what each shard of tokens showed in this layer. Where `targets` is not 0, the first `targets` of them saw the layer
    behind an already pruned prefix, and the others show, for the same tokens, what the original model's layer saw.
    """

    from moeflow.methods.prune.enumeration import weigh

    shards, originals = (seen[:targets], seen[targets:]) if targets else (seen, ())
    choice = weigh(
        context, read_config(config_from), layer_file, shards, originals,
        layer=layer, keep=keep, criterion=criterion, loss=loss, batch_tokens=batch_tokens, seed=seed, dtype=dtype,
    )  # fmt: skip
    (context.out / CHOICE).write_text(readable(choice))


def _importance_spec(rest: RestSpec, layer_spec: LayerSpec, *seen: ObservedSpec, layer: int, dtype: str) -> Spec:
    width, size = int(rest.config["hidden_size"]), 4 if precision(rest.config, dtype) == "float32" else 2
    rows = sum(s.rows for s in seen)
    reads = layer_spec.headers + layer_spec.block_bytes + rows * width * size
    writes = 80 + 32 * layer_spec.experts
    out = {"layer": layer, "experts": layer_spec.experts, "bytes": writes}
    return Spec(out, reads=reads, writes=writes, memory=2 * layer_spec.nbytes + (3 << 30))


@step("prune.importance", version=1, spec=_importance_spec, gpus=1)
def importance(context: Context, config: Artifact, layer_file: Artifact, *seen: Artifact, layer: int, dtype: str) -> None:
    """The relative change of one layer's output when one expert is left out, for each expert, as `importance.json`.

    Exact, from the Gram identity. In a layer whose router needs all its experts every importance is zero.
    """

    from moeflow.methods.prune.subset_search import without_each

    importance, tokens = without_each(context, read_config(config), layer_file, seen, layer=layer, dtype=dtype)
    write_importance(context, layer, importance, tokens)


def _importance_lm_spec(found: Any, recon: Any, *, layer: int) -> Spec:
    return Spec(recon, reads=found["bytes"] + recon["bytes"], writes=recon["bytes"])


@step("prune.importance_lm", version=1, spec=_importance_lm_spec)
def importance_lm(context: Context, found: Artifact, recon: Artifact, *, layer: int) -> None:
    """How much the model's loss grows when one expert of a layer is left out, for each expert, as `importance.json`.

    `recon`: the same layer's importance by its own output, which knows how many tokens each expert got.
    """
    losses, tokens = read_curves(found), read_importance(recon)["tokens"]
    without = losses["losses"].get(str(layer), {})
    importance = [max(0.0, without.get(str(e), losses["loss"]) - losses["loss"]) for e in range(len(tokens))]
    write_importance(context, layer, importance, tokens)
