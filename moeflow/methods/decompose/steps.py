"""Experts as products of two smaller matrices: their spectra, the ranks that a budget allows, and the rewritten layers.

MoE-I² (Yang et al., EMNLP Findings 2024, arXiv 2411.01016), section 3.3, and beyond it: `svd="whitened"` preserves an expert's
outputs on its routed tokens, where the paper's `svd="vanilla"` preserves its weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moeflow.arch import MATRICES, Family
from moeflow.methods import rewrite
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.decompose.ranks import (
    PARTS,
    Spectra,
    average_rank,
    check_rank,
    fewest_parameters,
    global_ranks,
    layer_ranks,
    most_rank,
    paper_ranks,
)
from moeflow.methods.records import Curves, Facts, Importance, Ranks
from moeflow.model import operations
from moeflow.model.layout import experts_in, headers, read_config
from moeflow.model.memory import on_device
from moeflow.model.spec import LayerSpec, ObservedSpec, RestSpec, TensorTable, element_bytes
from moeflow.step import Arithmetic, Artifact, Context, Part, Spec, Step, step

PER_TASK = 64
"""Experts of a layer that one task decomposes at most."""


def sides(before: LayerSpec) -> tuple[int, int]:
    """(expert width F, model width D) of a layer's experts. Raises ValueError if the experts are factored or slimmed already, or if
    the layer skips experts or has compressed ones."""
    family = Family.of(before.config)
    before.check_routing("decompose")
    before.check_plain("decompose")
    if before.slimmed_by or before.ranks_decided:
        how = before.slimmed_by or "ranks decided by a run"
        raise ValueError(f"layer {before.layer} is slimmed or decomposed already ({how}); decompose the model before")
    name = family.expert(before.layer, 0)[0]
    if name not in before.tensors:
        raise ValueError(f"{name} is not there: layer {before.layer} has no experts, or they are factored already")
    rows, columns = before.tensors[name][1]
    return int(rows), int(columns)


def tasks(before: Step) -> int:
    """Into how many tasks the work on a layer's experts is divided."""
    return max(1, -(-before.spec.output.experts // PER_TASK))


def spectra_of(layer: int, of: tuple[Step | Part, Step, tuple[Step | Part, ...]], how: Decomposition, dtype: str) -> Step:
    """The spectra of one layer; `of`: its inputs, as `Calibration.of` gives them."""
    parts = tasks(of[1])
    each = tuple(spectra(*of, layer=layer, task=[part, parts], how=how.of_spectra, dtype=dtype) for part in range(parts))
    return joined_spectra(each)


def factored(
    layer_: int, of: tuple[Step | Part, Step, tuple[Step | Part, ...]], ranks: Step | None, uniform: dict[str, int],
    how: Decomposition, dtype: str,
) -> Step:  # fmt: skip
    """One layer with its experts' matrices as products of two, to the ranks that a step decided, or to the same for all experts."""
    parts = tasks(of[1])
    same: dict[str, Any] = {"layer": layer_, "uniform": uniform, "how": how.of_a_layer, "dtype": dtype}
    each = tuple(layer(*of, ranks, task=[part, parts], **same) for part in range(parts))
    return each[0] if len(each) == 1 else rewrite.joined(each)


def _experts(task: list[int], experts: int) -> range:
    """The experts that one of several tasks treats."""
    part, parts = task
    return range(experts * part // parts, experts * (part + 1) // parts)


def _recorded_bytes(config: Any, observed: tuple[ObservedSpec, ...], dtype: str) -> int:
    return sum(shard.rows for shard in observed) * int(config["hidden_size"]) * element_bytes(config, dtype)


def _spectra_spec(
    rest: RestSpec, before: LayerSpec, observed: tuple[ObservedSpec, ...],
    *, layer: int, task: list[int], how: Decomposition, dtype: str,
) -> Spec:  # fmt: skip
    rows, columns = sides(before)
    recorded = _recorded_bytes(rest.config, observed, dtype)
    writes = 500 + len(_experts(task, before.experts)) * 3 * 8 * min(rows, columns) + before.experts * 24
    out = {"layer": layer, "bytes": writes, "experts": before.experts, "sides": [rows, columns]}
    working = before.loaded(dtype) + 2 * recorded + (2 << 30)
    memory, device = 2 * before.nbytes + before.loaded(dtype) + working, on_device(working)
    return Spec(
        out, reads=before.headers + before.block_bytes + recorded, writes=writes, operations=_operations(before, observed, task[1]),
        memory=memory, device=device,
    )  # fmt: skip


def _operations(
    before: LayerSpec, observed: tuple[ObservedSpec, ...], parts: int, *, whitened: bool = True
) -> Mapping[Arithmetic, int]:
    """Of a part of a layer's decomposition, with the moments of its experts' tokens where their outputs are to be preserved."""
    rows, columns = sides(before)
    less, tokens = min(rows, columns), sum(shard.rows for shard in observed)
    products = before.experts * 3 * 4 * max(rows, columns) * less**2
    if whitened:
        products += operations.moments(before, tokens, (columns, less))
    return {"float32": products // parts, "factors": before.experts * 3 * operations.DECOMPOSED * less**3 // parts}


@step("decompose.spectra", version=3, spec=_spectra_spec, gpus=1)
def spectra(
    context: Context, config: Artifact, before: Artifact, observed: tuple[Artifact, ...],
    *, layer: int, task: list[int], how: Decomposition, dtype: str,
) -> None:  # fmt: skip
    """How much each component of a matrix adds to its expert's outputs on the routed tokens, squared; see `ranks.Spectra`.

    `observed`: what each shard of tokens recorded in this layer. `task`: its number, from 0
    on, and how many tasks divide the experts.
    """

    from moeflow.methods.decompose import factoring

    read = read_config(config)
    some = _experts(task, experts_in(headers(before), read, layer))
    factoring.spectra(context, read, before, observed, how, layer=layer, experts=some, dtype=dtype).write(context.out)


def _joined_spectra_spec(parts: tuple[Any, ...]) -> Spec:
    size = sum(part["bytes"] for part in parts)
    return Spec(parts[0] | {"bytes": size}, reads=size, writes=size, memory=4 * size + (1 << 26))


@step("decompose.joined_spectra", version=1, spec=_joined_spectra_spec)
def joined_spectra(context: Context, parts: tuple[Artifact, ...]) -> None:
    """The spectra of a layer's experts, of those of its parts."""
    Spectra.joined([Spectra.read(part) for part in parts]).write(context.out)


def _paper_spec(importances: tuple[Any, ...], *, sides: dict[str, list[int]], how: Decomposition) -> Spec:
    for rows, columns in sides.values():
        paper_ranks([1.0], average_rank(how.ratio, rows, columns), most_rank(rows, columns, how), how)
    writes = 300 + 30 * sum(i["experts"] for i in importances)
    out = {"share": 1 - how.ratio, "multiple": how.multiple, "bytes": writes}
    return Spec(out, reads=sum(i["bytes"] for i in importances), writes=writes)


@step("decompose.ranks_paper", version=2, spec=_paper_spec)
def by_importance(context: Context, importances: tuple[Artifact, ...], *, sides: dict[str, list[int]], how: Decomposition) -> None:
    """The record `Ranks` by MoE-I²'s formula, from the importance of every expert of every layer; see `ranks.layer_ranks`.

    `sides`: per layer the expert width F and the model width D.
    """
    ranks: dict[int, dict[str, list[int]]] = {}
    for of_layer in map(Importance.read, importances):
        rows, columns = sides[str(of_layer.layer)]
        ranks[of_layer.layer] = dict.fromkeys(MATRICES, layer_ranks(of_layer, (rows, columns), how))
    Ranks("paper", ranks=ranks).write(context.out)


def _global_spec(spectra: tuple[Any, ...], curves: Any = None, *, layers: list[int], how: Decomposition) -> Spec:
    budget = 1 - how.ratio
    if not 0 < budget < 1:
        raise ValueError(f"ratio={how.ratio} of the experts' bytes must lie between 0 and 1")
    total = sum(i["experts"] * i["sides"][0] * i["sides"][1] for i in spectra)
    least = sum(i["experts"] * fewest_parameters(i["sides"][0], i["sides"][1], how) for i in spectra)
    if least > budget * total:
        raise ValueError(
            f"ratio={how.ratio:.4g} cannot be had with ranks from {how.r_min} in multiples of {how.multiple}; the nearest is "
            f"{1 - least / total:.4g}"
        )
    writes = 500 + 30 * sum(i["experts"] for i in spectra)
    options = sum(i["experts"] * 3 * min(i["sides"]) for i in spectra)
    out = {"share": budget, "multiple": how.multiple, "bytes": writes}
    reads = sum(i["bytes"] for i in (*spectra, *([curves] if curves else [])))
    return Spec(out, reads=reads, writes=writes, memory=(1 << 28) + 512 * options)


@step("decompose.ranks_global", version=2, spec=_global_spec)
def by_spectra(
    context: Context, spectra: tuple[Artifact, ...], curves: Artifact | None = None, *, layers: list[int], how: Decomposition
) -> None:
    """The record `Ranks` with the ranks that cost least in the whole model; see `ranks.global_ranks`.

    `spectra`: one for each of `layers`; `curves`: how far the model's predictions move when a layer's gate and up, or its down
    matrices, are cut. Without them each cut is taken to move them as far.
    """
    each = {layer: Spectra.read(artifact) for layer, artifact in zip(layers, spectra, strict=True)}
    moved = dict.fromkeys(layers, dict.fromkeys(PARTS, 1.0)) if curves is None else Curves.read(curves).curves
    global_ranks(each, moved, how).write(context.out)


def _layer_spec(
    rest: RestSpec, before: LayerSpec, observed: tuple[ObservedSpec, ...], ranks: Any = None,
    *, layer: int, task: list[int], uniform: dict[str, int], how: Decomposition, dtype: str,
) -> Spec:  # fmt: skip
    rows, columns = sides(before)
    for matrix, rank in uniform.items():
        if rank:
            check_rank(rank, *((rows, columns) if matrix != "down" else (columns, rows)), force=how.force)
    if ranks:
        out = replace(before, share=before.share * ranks["share"], ranks_decided=True, multiple=ranks["multiple"], elsewhere=False)
    else:
        out = replace(before, tensors=_cut(before, uniform), elsewhere=False)
    recorded = _recorded_bytes(rest.config, observed, dtype)
    working, writes = before.loaded(dtype) + 2 * recorded + (2 << 30), (out.nbytes + 90 * before.experts) // task[1] + 200
    memory, device = 2 * before.nbytes + before.loaded(dtype) + working, on_device(working)
    done = _operations(before, observed, task[1], whitened=how.svd == "whitened")
    return Spec(out, reads=before.nbytes + recorded, writes=writes, operations=done, memory=memory, device=device)


def _cut(before: LayerSpec, uniform: Mapping[str, int]) -> TensorTable:
    """A layer's tensors after each matrix of every expert is cut to its uniform rank."""
    family, table = Family.of(before.config), dict(before.tensors)
    for expert in range(before.experts):
        for matrix, name in zip(family.matrices, family.expert(before.layer, expert), strict=True):
            if rank := uniform.get(matrix, 0):
                dtype, (rows, columns) = table.pop(name)
                out, inner = family.factors(name)
                table |= {out: (dtype, (rows, rank)), inner: (dtype, (rank, columns))}
    return table


@step("decompose.layer", version=3, spec=_layer_spec, gpus=1)
def layer(
    context: Context, config: Artifact, before: Artifact, observed: tuple[Artifact, ...], ranks: Artifact | None = None,
    *, layer: int, task: list[int], uniform: dict[str, int], how: Decomposition, dtype: str,
) -> None:  # fmt: skip
    """One layer's file with its experts' matrices as products of two, everything else bit for bit the same, and `facts.json`.

    `observed`: what each shard of tokens recorded in this layer. The ranks are those of `ranks` or, without it, of `uniform`:
    one rank per matrix for all experts. `facts.json` says for each expert what was done with it. `task`: its number, from 0
    on, and how many tasks divide the experts; the first also writes everything else.
    """

    from moeflow.methods.decompose import factoring

    read = read_config(config)
    wanted: Mapping[str, Any] = uniform if ranks is None else Ranks.read(ranks).ranks[layer]
    some = _experts(task, experts_in(headers(before), read, layer))
    report = factoring.rewrite(context, read, before, observed, how, layer=layer, ranks=wanted, experts=some, dtype=dtype)
    Facts.of(before).and_then("decompose.layer", svd=how.svd, experts=report).write(context.out)
