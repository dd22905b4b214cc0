"""Pruning: which experts of a layer stay, chosen layer by layer, by counts out of one budget, or by several layers together.

NAEE (Lu et al., ACL 2024, arXiv 2402.14800) and MoE-I² (Yang et al., EMNLP Findings 2024, arXiv 2411.01016), section 3. `at` is the
index of the layer that a step reads; its input `observed` is what each shard of tokens recorded in it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from moeflow.arch import Family
from moeflow.methods.graph import HIDDEN, at_most
from moeflow.methods.prune.counts import between, fit, neighbours, shares
from moeflow.methods.prune.searches import ENUMERATE, SUBSET_SEARCHES, Search
from moeflow.methods.prune.subsets import MAX_SUBSETS, Subsets
from moeflow.methods.records import (
    Candidates,
    Choice,
    Combination,
    Combinations,
    Curves,
    Importance,
    KeptCounts,
    LayerLoss,
    Spread,
    left_out,
)
from moeflow.methods.scores import SCORES
from moeflow.model import operations
from moeflow.model.layout import LAYER, read_config
from moeflow.model.memory import on_device, passing
from moeflow.model.spec import HiddenSpec, LayerSpec, ObservedSpec, RestSpec, element_bytes, precision
from moeflow.sources.elsewhere import weights
from moeflow.step import Artifact, Context, Spec, step

MAX_COMBINATIONS = 10_000
GRAM = 3 << 30
"""Bytes that the Gram matrices of a layer and the outputs that they are made of take at most."""


def _check_enumeration(subsets: Subsets) -> None:
    if subsets.count > MAX_SUBSETS:
        others = ", ".join(name for name in SUBSET_SEARCHES if name != ENUMERATE)
        raise ValueError(
            f"keeping {subsets.keep} of {subsets.experts} experts means {subsets.count:,} subsets, over {MAX_SUBSETS:,}: "
            f"enumeration is for narrow layers; take another search ({others}) or a score ({', '.join(SCORES)})"
        )


def _input_bytes(rest: RestSpec, observed: Sequence[ObservedSpec], dtype: str) -> int:
    """The bytes of the recorded MoE inputs."""
    return sum(o.rows for o in observed) * int(rest.config["hidden_size"]) * element_bytes(rest.config, dtype)


def _statistics_bytes(layer: LayerSpec, observed: Sequence[ObservedSpec]) -> int:
    return len(observed) * (1400 + 7 * 8 * layer.experts)


def _choose_spec(
    rest: RestSpec, layer: LayerSpec, observed: tuple[ObservedSpec, ...], originals: tuple[ObservedSpec, ...],
    *, at: int, keep: int, how: Search, batch_tokens: int | None, dtype: str,
) -> Spec:  # fmt: skip
    family = Family.of(rest.config)
    family.check_keep(keep, family.num_experts)
    subsets = Subsets(layer.experts, keep, family.group_limit[0])
    exact = how.method == ENUMERATE
    if exact:
        _check_enumeration(subsets)
    every = (*observed, *originals)
    if how.loss == "batch-sum" and any(o.recorded < o.hidden.sequences * o.hidden.length for o in every):
        raise ValueError("loss='batch-sum' sums over whole batches and needs the inputs of all tokens: calibrate with record=None")
    out = {"layer": at, "keep": keep, "bytes": 1500, "measured": exact or how.measured > 0}
    if not exact and not how.measured:  # the scores of one layer, from its weights or its statistics
        weights = layer.block_bytes if SCORES[how.method].weights else 0
        reads = (layer.headers + weights if weights else 0) + _statistics_bytes(layer, observed)
        working = (layer.loaded(dtype) if weights else 0) + (1 << 28)
        return Spec(out, reads=reads, writes=300, memory=weights + working, device=on_device(working))
    reads = layer.headers + layer.block_bytes + _input_bytes(rest, every, dtype) + _statistics_bytes(layer, every)
    # the layer's weights, the largest shard's inputs and targets twice, and the intermediate tensors of a chunk of tokens in fp64
    working = layer.loaded(dtype) + 4 * max(_input_bytes(rest, [o], dtype) for o in every) + (1 << 30)
    writes = 1500 + (subsets.count if exact else 0) * (26 + 3 * keep)
    out["bytes"] = writes
    compared = (subsets.count if exact else 1) + len(SCORES)
    tokens = sum(o.rows for o in every)
    done = operations.errors_of_subsets(layer, tokens if exact else min(tokens, how.measured), compared, dtype)
    return Spec(out, reads=reads, writes=writes, operations=done, memory=layer.nbytes + working, device=on_device(working))


@step("prune.choose", version=4, spec=_choose_spec, gpus=1)
def choose(
    context: Context, config: Artifact, layer: Artifact, observed: tuple[Artifact, ...], originals: tuple[Artifact, ...] = (),
    *, at: int, keep: int, how: Search, batch_tokens: int | None, dtype: str,
) -> None:  # fmt: skip
    """Choose the `keep` experts of one layer that stay, by enumeration or by a score; writes a `Choice`.

    `originals`: what the original model recorded in the layer for the same tokens, if `observed` comes from a model whose earlier
    layers are pruned; the target is then the original layer's output. `batch_tokens`: the tokens of a batch, for loss="batch-sum".
    """
    from moeflow.methods.prune.enumeration import by_score, enumerate_layer

    files = context, read_config(config), layer, observed, originals
    if how.method == ENUMERATE:
        choice = enumerate_layer(*files, layer=at, keep=keep, how=how, batch_tokens=batch_tokens, dtype=dtype)
    else:
        choice = by_score(*files, layer=at, keep=keep, how=how, dtype=dtype)
    choice.write(context.out)


def _candidates_spec(
    rest: RestSpec, layer: LayerSpec, observed: tuple[ObservedSpec, ...], counts: Mapping[str, Any] | None,
    *, at: int, keep: list[int], protected: list[int], how: Search, dtype: str,
) -> Spec:  # fmt: skip
    family = Family.of(rest.config)
    compared = 0
    for count in keep:
        family.check_keep(count, layer.experts)
        subsets = Subsets(layer.experts, count, family.group_limit[0], tuple(protected))
        if how.method == ENUMERATE:
            _check_enumeration(subsets)
        each = subsets.count if how.method == ENUMERATE else how.evaluations(layer.experts)
        compared = compared + each if counts is None else max(compared, each)  # of several counts one is searched
    reads = layer.headers + layer.block_bytes + _input_bytes(rest, observed, dtype) + _statistics_bytes(layer, observed)
    sets = (len(keep) if counts is None else 1) * (how.best + 1 + len(SCORES))
    writes = 300 + sets * (70 + 4 * layer.experts)
    out = {"layer": at, "counts": keep, "experts": layer.experts, "bytes": writes}
    working = layer.loaded(dtype) + GRAM
    done = operations.errors_of_subsets(layer, sum(o.rows for o in observed), compared + len(SCORES), dtype)
    return Spec(out, reads=reads, writes=writes, operations=done, memory=layer.nbytes + working, device=on_device(working))


@step("prune.candidates", version=2, spec=_candidates_spec, gpus=1)
def candidates(
    context: Context, config: Artifact, layer: Artifact, observed: tuple[Artifact, ...], counts: Artifact | None = None,
    *, at: int, keep: list[int], protected: list[int], how: Search, dtype: str,
) -> None:  # fmt: skip
    """Find the best sets of one layer's experts for each count in `keep`, and those of the scores; writes `Candidates`.

    `counts`: the numbers of experts of all layers; with it, only this layer's count is searched, which is one of `keep`. The
    `protected` experts stay. A long search saves its state, from which an interrupted one continues.
    """
    from moeflow.methods.prune.subset_search import search_counts

    if counts is not None:
        keep = [KeptCounts.read(counts).of(at)]
    sets = search_counts(
        context, read_config(config), layer, observed, layer=at, keep=keep, protected=protected, how=how, dtype=dtype
    )
    sets.write(context.out)


def _importance_spec(rest: RestSpec, layer: LayerSpec, observed: tuple[ObservedSpec, ...], *, at: int, dtype: str) -> Spec:
    reads = layer.headers + layer.block_bytes + _input_bytes(rest, observed, dtype)
    writes = 80 + 32 * layer.experts
    out = {"layer": at, "experts": layer.experts, "bytes": writes}
    working = layer.loaded(dtype) + GRAM
    done = operations.errors_of_subsets(layer, sum(o.rows for o in observed), layer.experts, dtype)
    return Spec(out, reads=reads, writes=writes, operations=done, memory=layer.nbytes + working, device=on_device(working))


@step("prune.importance", version=2, spec=_importance_spec, gpus=1)
def importance(context: Context, config: Artifact, layer: Artifact, observed: tuple[Artifact, ...], *, at: int, dtype: str) -> None:
    """For each expert, the relative change of the layer's output without it; writes `Importance`.

    Exact, by the Gram identity. If a layer's router needs all its experts, every importance is zero.
    """
    from moeflow.methods.prune.subset_search import importance_of

    importance_of(context, read_config(config), layer, observed, layer=at, dtype=dtype).write(context.out)


def _importance_measured_spec(curves: Mapping[str, Any], recon: Mapping[str, Any], *, by: str) -> Spec:
    return Spec(recon, reads=curves["bytes"] + recon["bytes"], writes=recon["bytes"])


@step("prune.importance_measured", version=1, spec=_importance_measured_spec)
def importance_measured(context: Context, curves: Artifact, recon: Artifact, *, by: Literal["kl", "lm_loss"]) -> None:
    """For each expert of a layer, how far the model's predictions move without it, or how much its loss grows: `Importance`.

    `curves`: both without each expert, or without several together, for all layers; `recon`: the importance in this layer by its
    own output. Experts that were left out together share what that did, in proportion to the squared change of the layer's output
    without each of them, to which the divergence is proportional while it is small. A loss that falls counts as one that does not
    change.
    """
    measured, own = Curves.read(curves), Importance.read(recon)
    whole, of = (0.0, measured.curves) if by == "kl" else (measured.loss, measured.losses)
    importance = [0.0] * len(own.tokens)
    for name, value in of.get(own.layer, {}).items():
        together = left_out(name)
        squares = [own.importance[e] ** 2 for e in together]
        for e, square in zip(together, squares, strict=True):
            part = square / sum(squares) if sum(squares) else 1 / len(squares)
            importance[e] = max(0.0, value - whole) * part
    Importance(own.layer, tuple(importance), own.tokens).write(context.out)


def _counts_spec(measured: Any, *, legal: dict[str, list[int]], experts: dict[str, int], total: int) -> Spec:
    """`measured`: the importance of each layer's experts, or the curves of all layers."""
    reads = sum(m["bytes"] for m in (measured if isinstance(measured, tuple) else (measured,)))
    return Spec({"total": total, "share": total / sum(experts.values())}, reads=reads, writes=500 + 60 * len(legal))


@step("prune.counts_paper", version=2, spec=_counts_spec)
def counts_paper(
    context: Context, importances: tuple[Artifact, ...], *, legal: dict[str, list[int]], experts: dict[str, int], total: int
) -> None:
    """How many experts each layer keeps by the paper's rule (MoE-I², section 3.1), as `KeptCounts`.

    The more important a layer, the fewer experts it loses; its importance is the sum of its experts'. The paper leaves open how
    importance becomes a count. Here a layer's share of the dropped experts is proportional to one over its importance, capped by
    what it can lose, and rounded to `legal` counts that add up to `total` with the least squared deviation.
    """
    layers = {i.layer: sum(i.importance) for i in map(Importance.read, importances)}
    inverse = {i: 1 / (v + 1e-12) for i, v in layers.items()}
    caps = {i: experts[str(i)] - min(legal[str(i)]) for i in layers}
    gone = shares(inverse, caps, sum(experts.values()) - total)
    deviation = {i: {n: (experts[str(i)] - gone[i] - n) ** 2 for n in legal[str(i)]} for i in layers}
    KeptCounts("paper", total, fit(deviation, total), importance=layers).write(context.out)


@step("prune.counts_exact", version=2, spec=_counts_spec)
def counts_exact(context: Context, curves: Artifact, *, legal: dict[str, list[int]], experts: dict[str, int], total: int) -> None:
    """The `legal` counts that add up to `total` at the least cost, by each layer's measured curve; writes `KeptCounts`.

    Solved by dynamic programming. A curve is linear between measured counts, and zero if the layer keeps all its experts.
    """
    measured = Curves.read(curves).curves
    costs: dict[int, dict[int, float]] = {}
    for i, counts in legal.items():
        points = [*sorted((int(n), cost) for n, cost in measured.get(int(i), {}).items()), (experts[i], 0.0)]
        costs[int(i)] = {n: between(points, n) for n in counts}
    chosen = fit(costs, total)

    def spread(counts: Mapping[int, int]) -> Spread:
        return Spread(tuple(counts.values()), sum(costs[i][n] for i, n in counts.items()))

    runner_up = min(map(spread, neighbours(chosen, costs)), key=lambda other: other.cost, default=None)
    same = dict.fromkeys(chosen, total // len(chosen))
    uniform = spread(same) if total == sum(same.values()) and all(n in costs[i] for i, n in same.items()) else None
    KeptCounts("exact", total, chosen, cost=spread(chosen).cost, runner_up=runner_up, uniform=uniform).write(context.out)


def _of_shard_spec(
    rest: RestSpec, layers: tuple[LayerSpec, ...], candidates: tuple[Mapping[str, Any], ...], before: Any, behind: Any = None,
    *, first: int, best: int, dtype: str,
) -> Spec:  # fmt: skip
    count = best ** len(candidates)
    if count > MAX_COMBINATIONS:
        raise ValueError(
            f"K={best} sets in each of T={len(candidates)} layers are {count:,} combinations, over {MAX_COMBINATIONS:,}; lower K "
            "or T"
        )
    states: HiddenSpec = before.hidden if isinstance(before, ObservedSpec) else before
    reads = (
        sum(layer.nbytes for layer in layers) + sum(c["bytes"] for c in candidates) + states.nbytes * (1 if behind is None else 2)
    )
    resident = sum(best**t for t in range(max(1, len(candidates)))) + 2  # prefixes whose hidden states are in memory
    memory = max(layer.nbytes + 2 * layer.loaded(dtype) for layer in layers) + resident * states.nbytes
    writes = 200 + count * (60 + 8 * len(candidates))
    compared = 3 * 8 * states.length * int(rest.config["hidden_size"])  # in fp64
    device = on_device(passing(layers, states.length, dtype, copies=2) + compared)
    runs, done = 1, 0  # the prefixes of all combinations, each once, and the target where it is not there
    for layer in layers:
        runs *= best if layer.experts else 1
        done += (runs + (behind is None)) * operations.forward((layer,), states.sequences, states.length)
    return Spec(
        {"bytes": writes}, reads=reads, writes=writes, operations={precision(rest.config, dtype): done}, memory=memory,
        device=device,
    )  # fmt: skip


@step("prune.span_of_shard", version=1, spec=_of_shard_spec, gpus=1)
def combinations_of_shard(
    context: Context, config: Artifact, layers: tuple[Artifact, ...], candidates: tuple[Artifact, ...],
    before: Artifact, behind: Artifact | None = None, *, first: int, best: int, dtype: str,
) -> None:  # fmt: skip
    """The loss of every combination of the `best` sets of the layers with candidates on one shard; writes `Combinations`.

    `layers`: consecutive layers from `first` on; `candidates`: those of the layers with experts, in order; `before`: the hidden
    states before the first layer; `behind`: the original's hidden states behind the last, which are the target. Without `behind`,
    the target is the output of these layers with all their experts.
    """
    from moeflow.methods.prune import reception

    sets = {c.layer: [s.keep for s in c.only.best[:best]] for c in map(Candidates.read, candidates)}
    losses = reception.losses(
        read_config(config), [(first + i, weights(layer, LAYER)) for i, layer in enumerate(layers)], sets,
        before.file(HIDDEN), None if behind is None else behind.file(HIDDEN), dtype=dtype,
        batch=at_most(context), progress=context.progress,
    )  # fmt: skip
    Combinations(tuple(sets), tuple(Combination(c, losses[c]) for c in sorted(losses))).write(context.out)


def _combinations_spec(shards: tuple[Mapping[str, Any], ...]) -> Spec:
    size = shards[0]["bytes"]
    return Spec({"bytes": size}, reads=size * len(shards), writes=size)


@step("prune.span", version=3, spec=_combinations_spec)
def combinations(context: Context, shards: tuple[Artifact, ...]) -> None:
    """The loss of every combination of a span's sets over the tokens of all shards, best first; writes `Combinations`."""
    each = [Combinations.read(shard) for shard in shards]
    squares = Counter[tuple[int, ...]]()
    for of_shard in each:
        squares.update({c.sets: c.loss**2 for c in of_shard.combinations})
    order = sorted(squares, key=lambda c: (squares[c], c))
    layers = each[0].layers
    context.note(f"layers {layers[0]} to {layers[-1]}: best combination {list(order[0])} of {len(order)}")
    Combinations(layers, tuple(Combination(c, squares[c] ** 0.5) for c in order)).write(context.out)


def _pick_spec(
    candidates: Mapping[str, Any], counts: Mapping[str, Any] | None, together: Mapping[str, Any] | None, *, keep: int | None
) -> Spec:
    reads = candidates["bytes"] + sum(d.get("bytes", 200) for d in (counts, together) if d)
    share, least = counts["share"] if counts else 1.0, min(candidates["counts"])
    out = {"layer": candidates["layer"], "keep": keep, "share": share, "least": least, "bytes": 1500}
    return Spec(out, reads=reads, writes=1500)


@step("prune.pick", version=2, spec=_pick_spec)
def pick(
    context: Context, candidates: Artifact, counts: Artifact | None = None, span: Artifact | None = None, *, keep: int | None
) -> None:
    """Pick one of a layer's candidates: the best or, with `span`, the one in the best combination of its span; writes a `Choice`.

    `keep`: how many experts stay, if that is known when the graph is built; None: `counts` says it.
    """
    of_layer, rank = Candidates.read(candidates), 0
    if span is not None:
        together = Combinations.read(span)
        rank = together.combinations[0].sets[together.layers.index(of_layer.layer)]
    if counts is not None:
        keep = KeptCounts.read(counts).of(of_layer.layer)
    sets = of_layer.only if keep is None else of_layer.counts[keep]
    picked, runner_up = sets.best[rank], next((s for i, s in enumerate(sets.best) if i != rank), None)
    loss = LayerLoss("frobenius", picked.loss, picked.of_output, of_layer.tokens)
    Choice(of_layer.layer, of_layer.experts, picked.keep, of_layer.method, loss, runner_up, sets.baselines).write(context.out)
