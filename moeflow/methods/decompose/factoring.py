"""Cuts a layer's experts to their ranks, and computes the spectra that say what a rank costs: the tensor side of `decompose`.

Shapes are suffixes: T tokens, D model width, F expert width, E experts, K the smaller side of a matrix.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moeflow.arch import Config, Family
from moeflow.methods.decompose.lowrank import components, energies, vanilla
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.decompose.ranks import Spectra
from moeflow.methods.moments import Moments, layer_moments
from moeflow.methods.rare import treatments
from moeflow.methods.recorded import layer_of, routed_tokens
from moeflow.model.checkpoint import Tensors, save
from moeflow.model.layout import LAYER, Files
from moeflow.model.moe import MLP, LowRank, MoELayer
from moeflow.step import Context


@torch.inference_mode()
def spectra(
    context: Context, config: Config, before: Files, observed: Sequence[Files], how: Decomposition,
    *, layer: int, experts: range, dtype: str,
) -> Spectra:  # fmt: skip
    """The energies of the components of every matrix of these experts, and what else a budget of ranks needs, for `Spectra.joined`.

    An expert with too few tokens has the energies of its weights; an expert without tokens costs nothing in the end.
    """
    family, tensors = Family.of(config), Tensors(before)
    moe = layer_of(tensors, config, layer, dtype)
    tokens = routed_tokens(moe, observed)
    treated = treatments(tokens, how.least, how.rare, method="whitened", by_weights="vanilla")
    each: dict[str, list[Tensor]] = {m: [] for m in family.matrices}
    for expert, moments in _moments(moe, observed, how.weighted, experts):
        for m, w in zip(family.matrices, _matrices(moe.experts[expert]), strict=True):
            moment: dict[str, Any] = moments[m]
            if treated[expert] != "whitened":
                energy_K = energies(w)
            elif _silent(moment):
                energy_K = torch.zeros(min(w.shape))  # nothing comes out, and nothing of it is lost
            else:
                energy_K = components(w, shrink=how.shrink, **moment).energy_K
            each[m].append(energy_K.cpu().double())
        context.progress(len(each[m]), len(experts), "experts")
    rows, columns = _matrices(moe.experts[0])[0].shape
    itemsize = tensors[family.expert(layer, 0)[0]].element_size()
    whole_E = np.array([int(t == "keep") for t in treated])
    of_outputs_E = np.array([int(treated[e] == "whitened") for e in experts])
    found = {m: torch.stack(by_expert).numpy() for m, by_expert in each.items()}
    return Spectra(found, np.array(tokens), whole_E, (rows, columns), itemsize, experts.start, of_outputs_E)


@torch.inference_mode()
def rewrite(
    context: Context, config: Config, before: Files, observed: Sequence[Files], how: Decomposition,
    *, layer: int, ranks: Mapping[str, Any], experts: range, dtype: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write the layer's file with factors in place of these experts' matrices, and return for each what was done.

    `ranks`: per matrix one rank, or one for each expert; 0 leaves it whole. What is of no expert is beside the first one.
    """
    family, tensors = Family.of(config), Tensors(before)
    moe = layer_of(tensors, config, layer, dtype)
    tokens = routed_tokens(moe, observed)
    treated = treatments(tokens, how.least, how.rare, method=how.svd, by_weights="vanilla")
    by_expert = [
        {m: int(r[e] if isinstance(r := ranks.get(m, 0), list) else r) for m in family.matrices} for e in range(moe.num_experts)
    ]
    names = {name: e for e in range(moe.num_experts) for name in family.expert(layer, e)}
    result = {n: t for n, t in tensors.items() if names.get(n, 0) in experts}
    report = []
    needed = how.svd == "whitened" and any(any(r.values()) for r in by_expert)
    statistics = _moments(moe, observed, how.weighted, experts) if needed else ((e, None) for e in experts)
    for expert, moments in statistics:
        wanted = by_expert[expert] if treated[expert] != "keep" else dict.fromkeys(family.matrices, 0)
        entry: dict[str, Any] = {"expert": expert, "tokens": tokens[expert], "ranks": wanted, "lost": {}}
        for m, name, w in zip(family.matrices, family.expert(layer, expert), _matrices(moe.experts[expert]), strict=True):
            if not wanted[m]:
                continue
            cut, entry["lost"][m] = _cut(w, wanted[m], moments if treated[expert] == "whitened" else None, m, how.shrink)
            stored = result.pop(name).dtype
            for factor, tensor in zip(family.factors(name), (cut.out_MR, cut.in_RN), strict=True):
                result[factor] = tensor.to(stored).cpu()
        entry["by"] = treated[expert] if any(wanted.values()) else "whole"
        report.append(entry)
        context.progress(len(report), len(experts), "experts")
    if few := [e for e in experts if treated[e] != how.svd]:
        what = "stay whole" if how.rare == "keep" else "are cut by their weights alone"
        context.note(f"layer {layer}: experts {few} saw fewer than {how.least} tokens and {what}")
    save(result, context.out / LAYER)
    return report


def _cut(w_MN: Tensor, rank: int, moments: Moments | None, matrix: str, shrink: float) -> tuple[LowRank, float]:
    """The factors, and the lost part of the squared norm: that of the outputs or, without moments or outputs, of the weights."""
    w_MN = w_MN.float()
    if moments is None or _silent(moments[matrix]):
        cut = vanilla(w_MN, rank)
        return cut, float((w_MN - cut.whole()).square().sum() / w_MN.square().sum().clamp(min=1e-30))
    moment: dict[str, Any] = moments[matrix]
    parts = components(w_MN, rank=rank, shrink=shrink, **moment)
    total = float(parts.energy_K.sum())
    return parts.truncated(rank), float(parts.error(rank)) ** 2 / total if total else 0.0


def _silent(moment: Mapping[str, Tensor]) -> bool:
    """Whether what a matrix takes in, or gives, was zero on every token, as where an expert has zero weights."""
    return not any(bool(m.any()) for m in moment.values())


def _moments(moe: MoELayer, observed: Sequence[Files], weighted: bool, experts: range) -> Iterator[tuple[int, Moments]]:
    """The second moments of each of these experts in turn, over the tokens that all shards recorded."""
    shards = [Tensors(shard)["x_RD"].to(moe.router_ED.device, moe.router_ED.dtype) for shard in observed]
    yield from zip(experts, layer_moments(moe, torch.cat(shards), weighted=weighted, experts=experts), strict=True)


def _matrices(expert: MLP) -> list[Tensor]:
    """The matrices of an expert that is not low-rank yet, in the order of `Family.matrices`."""
    return [matrix for matrix in expert.matrices if isinstance(matrix, Tensor)]
