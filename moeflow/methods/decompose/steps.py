"""Experts as products of two smaller matrices: their spectra, the ranks that a budget allows, and the rewritten layers.

MoE-I² (Yang et al., EMNLP Findings 2024, arXiv 2411.01016), section 3.3, and beyond it: `svd="whitened"` keeps an expert's outputs
on its routed tokens, where the paper's `svd="vanilla"` keeps its weights.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moeflow.arch import MATRICES, Family
from moeflow.methods.allocate import allocate_curves, exactly
from moeflow.methods.decompose.ranks import Spectrum, average_rank, break_even, check_rank, choices, paper_ranks, treatment
from moeflow.methods.records import DECOMPOSED, RANKS, Curves, Facts, Importance, read_ranks
from moeflow.model.layout import read_config
from moeflow.model.spec import LayerSpec, ObservedSpec, RestSpec, TensorTable, precision
from moeflow.step import Artifact, Context, Spec, step

SPECTRA = "spectra.safetensors"
KINDS = ("vanilla", "whitened")
PARTS = {"gate_up": ("gate", "up"), "down": ("down",)}
"""What of an expert is whole or factored together, and measured together."""


def sides(layer_spec: LayerSpec) -> tuple[int, int]:
    """(expert width F, model width D) of a layer's experts, none of which is factored yet. Raises ValueError where one is, and
    where the layer skips experts or has compressed ones."""
    layer_spec.check_routing("decompose")
    layer_spec.check_plain("decompose")
    if layer_spec.slimmed:
        raise ValueError(
            f"layer {layer_spec.layer} is slimmed or decomposed already ({layer_spec.slimmed}); decompose the model before"
        )
    name = Family.of(layer_spec.config).expert(layer_spec.layer, 0)[0]
    if name not in layer_spec.tensors:
        raise ValueError(f"{name} is not there: layer {layer_spec.layer} has no experts, or they are factored already")
    rows, columns = layer_spec.tensors[name][1]
    return int(rows), int(columns)


def check(svd: str, policy: str, least: int, multiple: int, shrink: float = 0.0) -> None:
    """Raise ValueError where a parameter of a decomposition is out of its range."""
    if svd not in KINDS:
        raise ValueError(f"svd={svd!r} is not known; choose one of {', '.join(KINDS)}")
    if least < 0 or multiple < 1:
        raise ValueError(f"least={least} tokens must be at least 0, and multiple={multiple} at least 1")
    if not 0 <= shrink <= 1:
        raise ValueError(f"shrink={shrink} must lie between 0, trusting the tokens alone, and 1")
    treatment([], least, policy)


def _seen_bytes(config: Any, seen: Sequence[Any], dtype: str) -> int:
    width, size = int(config["hidden_size"]), 4 if precision(config, dtype) == "float32" else 2
    return sum(s.rows for s in seen if isinstance(s, ObservedSpec)) * width * size


def _spectra_spec(
    rest: RestSpec,
    layer_spec: LayerSpec,
    *seen: ObservedSpec,
    layer: int,
    least: int,
    policy: str,
    weighted: bool,
    shrink: float,
    dtype: str,
) -> Spec:
    check("whitened", policy, least, 1, shrink)
    rows, columns = sides(layer_spec)
    writes = 500 + layer_spec.experts * (3 * 8 * min(rows, columns) + 8)
    reads = layer_spec.headers + layer_spec.block_bytes + _seen_bytes(rest.config, seen, dtype)
    out = {"layer": layer, "bytes": writes, "experts": layer_spec.experts, "sides": [rows, columns]}
    memory = 4 * layer_spec.nbytes + 2 * _seen_bytes(rest.config, seen, dtype) + (2 << 30)
    return Spec(out, reads=reads, writes=writes, memory=memory)


@step("decompose.spectra", version=1, spec=_spectra_spec, gpus=1)
def spectra(
    context: Context, config: Artifact, layer_file: Artifact, *seen: Artifact,
    layer: int, least: int, policy: str, weighted: bool, shrink: float, dtype: str,
) -> None:  # fmt: skip
    """What each component of each matrix adds to its expert's outputs on the routed tokens, squared, as `spectra.safetensors`.

    `gate_EK`, `up_EK`, `down_EK` (fp64), `tokens_E`, `whole_E` (1: `policy` keeps an expert whole), `sides` (F, D), `itemsize`.
    """

    from moeflow.methods.decompose import factoring

    factoring.spectra(
        context, read_config(config), layer_file, seen, context.out / SPECTRA,
        layer=layer, least=least, policy=policy, weighted=weighted, shrink=shrink, dtype=dtype,
    )  # fmt: skip


def _paper_spec(
    *inputs: Any, layers: list[dict[str, Any]],
    ratio: float, alpha: float, r_min: int, r_max: int, multiple: int, least: int, policy: str,
) -> Spec:  # fmt: skip
    check("vanilla", policy, least, multiple)
    if alpha < 0:
        raise ValueError(f"alpha={alpha} must be at least 0, where all ranks are the same")
    for layer in layers:
        average = average_rank(ratio, *layer["sides"])
        paper_ranks([1.0], average, alpha=alpha, r_min=r_min, r_max=_most(r_max, *layer["sides"]), multiple=multiple)
    experts = sum(i["experts"] for i in inputs)
    writes = 300 + 30 * experts
    told = {"share": 1 - ratio, "multiple": multiple, "bytes": writes}
    return Spec(told, reads=sum(i["bytes"] for i in inputs), writes=writes)


@step("decompose.ranks_paper", version=1, spec=_paper_spec)
def by_importance(
    context: Context, *importances: Artifact, layers: list[dict[str, Any]],
    ratio: float, alpha: float, r_min: int, r_max: int, multiple: int, least: int, policy: str,
) -> None:  # fmt: skip
    """Ranks by the paper's formula, the same for an expert's three matrices, as `ranks.json`.

    `layers`: number and sides (F, D) of each; `ratio`: the part of the parameters that goes in every layer. An expert that stays
    whole (`policy="keep"`, fewer than `least` tokens) is paid for by the others of its layer. Raises ValueError where they cannot.
    """
    found: dict[str, Any] = {}
    for layer, artifact in zip(layers, importances, strict=True):
        seen = Importance.read(artifact)
        rows, columns = layer["sides"]
        even = break_even(rows, columns)
        whole = [t == "keep" for t in treatment(seen.tokens, least, policy)]
        cut = [v for v, w in zip(seen.importance, whole, strict=True) if not w]
        left = average_rank(ratio, rows, columns) * len(whole) - even * sum(whole)
        if left < r_min * len(cut):
            nearest = 1 - (even * sum(whole) + r_min * len(cut)) / (even * len(whole))
            raise ValueError(
                f"{sum(whole)} of the {len(whole)} experts of layer {layer['layer']} saw fewer than {least} tokens and stay whole: "
                f"the others cannot make up for ratio={ratio}; the nearest is {nearest:.4f}, or calibrate on more tokens"
            )
        each = left / max(1, len(cut))
        limits = {"r_min": r_min, "r_max": _most(r_max, rows, columns), "multiple": multiple}
        ranks = iter(paper_ranks(cut, each, alpha=alpha, **limits) if cut else ())
        line = [0 if w else next(ranks) for w in whole]
        found[str(layer["layer"])] = {m: line for m in MATRICES}
    _write_ranks(context, "paper", found)


def _most(r_max: int, rows: int, columns: int) -> int:
    """The largest rank that saves anything, or the stated one where that is less."""
    even = int(break_even(rows, columns))
    return min(r_max, even) if r_max else even


def _smallest(rows: int, columns: int, r_min: int, multiple: int) -> int:
    """The parameters of a matrix at the smallest rank that it may have."""
    return min(-(-r_min // multiple) * multiple * (rows + columns), rows * columns)


def _global_spec(*inputs: Any, layers: list[int], budget: float, multiple: int, r_min: int, r_max: int) -> Spec:
    if not 0 < budget < 1:
        raise ValueError(f"budget={budget} is the part of the experts' bytes that stays and must lie between 0 and 1")
    if min(multiple, r_min) < 1 or r_max < 0:
        raise ValueError(f"r_min={r_min} and multiple={multiple} must be at least 1, and r_max={r_max} at least 0")
    spectra = inputs[:-1]
    total = sum(i["experts"] * i["sides"][0] * i["sides"][1] for i in spectra)
    least = sum(i["experts"] * _smallest(i["sides"][0], i["sides"][1], r_min, multiple) for i in spectra)
    if least > budget * total:
        raise ValueError(
            f"ratio={1 - budget:.4g} cannot be had with ranks from {r_min} in multiples of {multiple}; the nearest is "
            f"{1 - least / total:.4g}"
        )
    writes = 500 + 30 * sum(i["experts"] for i in spectra)
    options = sum(i["experts"] * 3 * min(i["sides"]) for i in spectra)
    told = {"share": budget, "multiple": multiple, "bytes": writes}
    return Spec(told, reads=sum(i["bytes"] for i in inputs), writes=writes, memory=(1 << 28) + 512 * options)


@step("decompose.ranks_global", version=1, spec=_global_spec)
def by_spectra(
    context: Context, *inputs: Artifact, layers: list[int], budget: float, multiple: int, r_min: int, r_max: int
) -> None:
    """The ranks of all matrices together that cost least within `budget` (a part of the experts' bytes), as `ranks.json`.

    `inputs`: the spectra of each of `layers`, and the curves that say how much the model's predictions move when a layer's gate and
    up, or its down matrices, are cut: each squared error is weighted by how much of that movement it stands for. Beside the ranks
    stand what they cost by this measure, whether that is the least there is, and the cost of the same rank everywhere. Raises
    ValueError where experts that stay whole leave too little for the others.
    """

    from moeflow.methods.decompose import factoring

    given = {layer: factoring.read_spectra(a) for layer, a in zip(layers, inputs[:-1], strict=True)}
    moved = Curves.read(inputs[-1]).curves
    items: list[list[Spectrum]] = []
    owners: list[tuple[int, int, tuple[str, ...]]] = []
    total, fixed, least, itemsize, same = 0, 0, 0, 0, 0.0
    found: dict[str, Any] = {}
    for layer, seen in given.items():
        rows, columns = (int(n) for n in seen["sides"])
        itemsize, cut = int(seen["itemsize"]), moved_rank(rows, columns)
        found[str(layer)] = {m: [0] * len(seen["tokens_E"]) for m in MATRICES}
        for part, matrices in PARTS.items():
            # those that stay whole were not cut when the movement was measured
            lost = sum(float(seen[f"{m}_EK"][seen["whole_E"] == 0, cut:].sum()) for m in matrices)
            weight = max(moved[layer][part], 0.0) / max(lost, 1e-30)
            for expert, whole in enumerate(seen["whole_E"]):
                size = rows * columns * itemsize * len(matrices)
                total += size
                if whole:
                    fixed += size
                    continue
                least += _smallest(rows, columns, r_min, multiple) * itemsize * len(matrices)
                shape = (rows, columns) if part == "gate_up" else (columns, rows)
                items.append([Spectrum(*shape, seen[f"{m}_EK"][expert], weight) for m in matrices])
                owners.append((layer, expert, matrices))
                average = int(average_rank(1 - budget, rows, columns)) // multiple * multiple
                same += weight * sum(float(seen[f"{m}_EK"][expert, average:].sum()) for m in matrices)
    if int(total * budget) - fixed < least:
        raise ValueError(
            f"experts that saw too few tokens stay whole and take {fixed:,} of {int(total * budget):,} bytes: too many for the "
            f"others; the nearest ratio is {1 - (fixed + least) / total:.4f}, or calibrate on more tokens"
        )
    curves, options = choices(items, itemsize=itemsize, multiple=multiple, r_min=r_min, r_max=r_max or None)
    left = int(total * budget) - fixed
    chosen, cost = allocate_curves(curves, left), 0.0
    for (layer, expert, matrices), curve, ranks, option in zip(owners, curves, options, chosen, strict=True):
        for matrix, rank in zip(matrices, ranks[option], strict=True):
            found[str(layer)][matrix][expert] = rank
        cost += float(curve[option][1])
    _write_ranks(
        context, "global", found, budget=int(total * budget), optimal=exactly(curves, left), cost=cost,
        cost_of_the_same_rank_everywhere=same,
    )  # fmt: skip


def moved_rank(rows: int, columns: int) -> int:
    """The rank at which the sweep cuts a layer to see how much that moves the model: two thirds of break-even."""
    return max(1, int(break_even(rows, columns) * 2 / 3))


def _write_ranks(context: Context, rule: str, ranks: Mapping[str, Any], **facts: Any) -> None:
    layers = ",\n".join(
        f"  {json.dumps(layer)}: {{\n" + ",\n".join(f"   {json.dumps(m)}: {json.dumps(r)}" for m, r in by.items()) + "\n  }"
        for layer, by in ranks.items()
    )
    head = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in ({"rule": rule} | facts).items())
    (context.out / RANKS).write_text("{\n" + head + ' "ranks": {\n' + layers + "\n }\n}\n")


def _layer_spec(
    rest: RestSpec, given: LayerSpec, *inputs: Any,
    layer: int, decided: bool, uniform: dict[str, int], svd: str, least: int, policy: str, weighted: bool, shrink: float,
    force: bool, dtype: str,
) -> Spec:  # fmt: skip
    check(svd, policy, least, 1, shrink)
    rows, columns = sides(given)
    for matrix, rank in uniform.items():
        if matrix not in MATRICES:
            raise ValueError(f"uniform={uniform} names {matrix!r}; the matrices are {', '.join(MATRICES)}")
        if rank:
            check_rank(rank, *((rows, columns) if matrix != "down" else (columns, rows)), force=force)
    if bool(uniform.get("gate")) != bool(uniform.get("up")):
        raise ValueError(f"uniform={uniform}: gate and up of an expert are both whole or both factored")
    seen = [s for s in inputs if isinstance(s, ObservedSpec)]
    if decided:
        share, multiple = given.share * inputs[0]["share"], inputs[0]["multiple"]
        out = LayerSpec(given.config, layer, given.experts, given.tensors, share, given.fewest, DECOMPOSED, multiple)
    else:
        out = LayerSpec(given.config, layer, given.experts, _cut(given, uniform), given.share, given.fewest)
    reads = given.nbytes + _seen_bytes(rest.config, seen, dtype)
    writes = out.nbytes + 200 + 90 * given.experts
    memory = 4 * given.nbytes + 2 * _seen_bytes(rest.config, seen, dtype) + (2 << 30)
    return Spec(out, reads=reads, writes=writes, memory=memory)


def _cut(given: LayerSpec, uniform: Mapping[str, int]) -> TensorTable:
    """A layer's tensors where each matrix of every expert has its uniform rank."""
    family, table = Family.of(given.config), dict(given.tensors)
    for expert in range(given.experts):
        for matrix, name in zip(MATRICES, family.expert(given.layer, expert), strict=True):
            if rank := uniform.get(matrix, 0):
                dtype, (rows, columns) = table.pop(name)
                out, inner = family.factors(name)
                table |= {out: (dtype, (rows, rank)), inner: (dtype, (rank, columns))}
    return table


@step("decompose.layer", version=1, spec=_layer_spec, gpus=1)
def layer(
    context: Context, config: Artifact, given: Artifact, *inputs: Artifact,
    layer: int, decided: bool, uniform: dict[str, int], svd: str, least: int, policy: str, weighted: bool, shrink: float,
    force: bool, dtype: str,
) -> None:  # fmt: skip
    """One layer's file with its experts' matrices as products of two, everything else bit for bit, and `facts.json`.

    `inputs`: where `decided`, first the ranks of all layers, which stand in place of `uniform` (a rank for every expert, per
    matrix); then what each shard of tokens showed in this layer. An expert that saw fewer than `least` tokens is cut by its weights
    alone or stays whole, as `policy` says; `facts.json` tells it for each.
    """

    from moeflow.methods.decompose import factoring

    seen = inputs[1:] if decided else inputs
    ranks: dict[str, Any] = read_ranks(inputs[0])[str(layer)] if decided else uniform
    report = factoring.rewrite(
        context, read_config(config), given, seen, context.out / "layer.safetensors",
        layer=layer, ranks=ranks, svd=svd, least=least, policy=policy, weighted=weighted, shrink=shrink, force=force, dtype=dtype,
    )  # fmt: skip
    Facts.of(given).and_then("decompose.layer", svd=svd, experts=report).write(context.out)
