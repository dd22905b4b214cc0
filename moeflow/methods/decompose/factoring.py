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
    context: Context, config: Config, before: Files, observed: Sequence[Files], how: Decomposition, *, layer: int, dtype: str
) -> Spectra:
    """The energies of every matrix's components, and what else a budget of ranks needs.

    An expert with too few tokens gets the spectrum of its weights, scaled to the energy per token of the layer's other experts; an
    expert without tokens costs nothing.
    """
    family, tensors = Family.of(config), Tensors(before)
    moe = layer_of(tensors, config, layer, dtype)
    tokens = routed_tokens(moe, observed)
    treated = treatments(tokens, how.least, how.rare, method="whitened", by_weights="vanilla")
    each: dict[str, dict[int, Tensor]] = {m: {} for m in family.matrices}
    for expert, moments in _moments(moe, observed, how.weighted):
        if treated[expert] == "whitened":
            for m, w in zip(family.matrices, _matrices(moe.experts[expert]), strict=True):
                moment: dict[str, Any] = moments[m]
                each[m][expert] = components(w, shrink=how.shrink, **moment).energy_K.cpu()
        context.progress(expert + 1, moe.num_experts, "experts")
    result = {}
    for at, (m, by_expert) in enumerate(each.items()):
        per_token = sum(float(energy_K.sum()) for energy_K in by_expert.values()) / max(1, sum(tokens[e] for e in by_expert))
        for e in set(range(moe.num_experts)) - set(by_expert):
            plain_K = energies(_matrices(moe.experts[e])[at]).cpu()
            by_expert[e] = plain_K * (per_token * tokens[e] / max(float(plain_K.sum()), 1e-30))
        result[m] = torch.stack([by_expert[e] for e in range(moe.num_experts)]).numpy()
    rows, columns = _matrices(moe.experts[0])[0].shape
    itemsize = tensors[family.expert(layer, 0)[0]].element_size()
    whole_E = np.array([int(t == "keep") for t in treated])
    return Spectra(result, np.array(tokens), whole_E, (rows, columns), itemsize)


@torch.inference_mode()
def rewrite(
    context: Context, config: Config, before: Files, observed: Sequence[Files], how: Decomposition,
    *, layer: int, ranks: Mapping[str, Any], dtype: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write the layer's file with factors in place of matrices, and return for every expert what was done.

    `ranks`: per matrix one rank, or one for each expert; 0 leaves it whole.
    """
    family, tensors = Family.of(config), Tensors(before)
    moe = layer_of(tensors, config, layer, dtype)
    tokens = routed_tokens(moe, observed)
    treated = treatments(tokens, how.least, how.rare, method=how.svd, by_weights="vanilla")
    by_expert = [
        {m: int(r[e] if isinstance(r := ranks.get(m, 0), list) else r) for m in family.matrices} for e in range(moe.num_experts)
    ]
    result = dict(tensors)
    report = []
    needed = how.svd == "whitened" and any(any(r.values()) for r in by_expert)
    statistics = _moments(moe, observed, how.weighted) if needed else ((e, None) for e in range(moe.num_experts))
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
        context.progress(expert + 1, moe.num_experts, "experts")
    if few := [e for e, by in enumerate(treated) if by != how.svd]:
        what = "stay whole" if how.rare == "keep" else "are cut by their weights alone"
        context.note(f"layer {layer}: experts {few} saw fewer than {how.least} tokens and {what}")
    save(result, context.out / LAYER)
    return report


def _cut(w_MN: Tensor, rank: int, moments: Moments | None, matrix: str, shrink: float) -> tuple[LowRank, float]:
    """The factors, and the lost part of the squared norm: that of the outputs or, without moments, of the weights."""
    w_MN = w_MN.float()
    if moments is None:
        cut = vanilla(w_MN, rank)
        return cut, float((w_MN - cut.whole()).square().sum() / w_MN.square().sum().clamp(min=1e-30))
    moment: dict[str, Any] = moments[matrix]
    parts = components(w_MN, rank=rank, shrink=shrink, **moment)
    total = float(parts.energy_K.sum())
    return parts.truncated(rank), float(parts.error(rank)) ** 2 / total if total else 0.0


def _moments(moe: MoELayer, observed: Sequence[Files], weighted: bool) -> Iterator[tuple[int, Moments]]:
    """The second moments of each expert in turn, over the tokens that all shards recorded."""
    shards = [Tensors(shard)["x_RD"].to(moe.router_ED.device, moe.router_ED.dtype) for shard in observed]
    yield from enumerate(layer_moments(moe, torch.cat(shards), weighted=weighted))


def _matrices(expert: MLP) -> list[Tensor]:
    """The matrices of an expert that is not low-rank yet, in the order of `Family.matrices`."""
    return [matrix for matrix in expert.matrices if isinstance(matrix, Tensor)]
