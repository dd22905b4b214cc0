"""A layer's experts cut to their ranks, and the spectra that say what a rank costs: the tensor side of `decompose`.

Shapes are suffixes: T tokens, D model width, F expert width, E experts, K the smaller side of a matrix.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeflow.arch import MATRICES, Config, Family
from moeflow.methods.decompose.lowrank import components, energies, vanilla
from moeflow.methods.decompose.ranks import check_rank, treatment
from moeflow.methods.moments import Moments, layer_moments
from moeflow.methods.recorded import layer_of, routed_tokens
from moeflow.model.checkpoint import Tensors, save
from moeflow.model.layout import Files
from moeflow.model.moe import MLP, LowRank, MoELayer
from moeflow.step import Context


@torch.inference_mode()
def spectra(
    context: Context, config: Config, layer_file: Files, seen: Sequence[Files], out: Path,
    *, layer: int, least: int, policy: str, weighted: bool, shrink: float, dtype: str,
) -> None:  # fmt: skip
    """Write the energies of every matrix's components, and what a budget has to know beside them.

    An expert with too few tokens gets the spectrum of its weights, scaled to what the layer's other experts do to each of their
    tokens: one that nobody reaches costs nothing.
    """
    tensors = Tensors(layer_file)
    moe = layer_of(tensors, config, layer, dtype)
    tokens = routed_tokens(moe, seen)
    fates = treatment(tokens, least, policy)
    found: dict[str, list[Tensor | None]] = {m: [None] * moe.num_experts for m in MATRICES}
    for expert, moments in _moments(moe, seen, weighted):
        if fates[expert] == "whitened":
            for m, w in zip(MATRICES, _matrices(moe.experts[expert]), strict=True):
                moment: dict[str, Any] = moments.of(m)
                found[m][expert] = energies(w, shrink=shrink, **moment).cpu()
        context.progress(expert + 1, moe.num_experts, "experts")
    result: dict[str, Tensor] = {}
    for m in MATRICES:
        spectra_E = found[m]
        known = [e for e, t in enumerate(spectra_E) if t is not None]
        each = sum(float(t.sum()) for t in spectra_E if t is not None) / max(1, sum(tokens[e] for e in known))
        for e in (e for e, t in enumerate(spectra_E) if t is None):
            plain_K = energies(_matrices(moe.experts[e])[MATRICES.index(m)]).cpu()
            spectra_E[e] = plain_K * (each * tokens[e] / max(float(plain_K.sum()), 1e-30))
        result[f"{m}_EK"] = torch.stack([t for t in spectra_E if t is not None])
    rows, columns = _matrices(moe.experts[0])[0].shape
    name = Family.of(config).expert(layer, 0)[0]
    result |= {
        "tokens_E": torch.tensor(tokens),
        "whole_E": torch.tensor([int(f == "keep") for f in fates]),
        "sides": torch.tensor([rows, columns]),
        "itemsize": torch.tensor(tensors[name].element_size()),
    }
    save(result, out)


def read_spectra(files: Files) -> dict[str, Any]:
    """What `spectra` wrote, as numpy arrays."""
    return {n: t.numpy() for n, t in Tensors(files).items()}


@torch.inference_mode()
def rewrite(
    context: Context, config: Config, given: Files, seen: Sequence[Files], out: Path,
    *, layer: int, ranks: Mapping[str, Any], svd: str, least: int, policy: str, weighted: bool, shrink: float, force: bool,
    dtype: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write the layer's file with factors in place of matrices, and say for every expert what was done with it.

    `ranks`: per matrix one rank, or one for each expert; 0 leaves it whole. Raises ValueError for a rank above break-even.
    """
    family, tensors = Family.of(config), Tensors(given)
    moe = layer_of(tensors, config, layer, dtype)
    tokens = routed_tokens(moe, seen)
    fates = treatment(tokens, least, policy)
    by_expert = [{m: int(r[e] if isinstance(r := ranks.get(m, 0), list) else r) for m in MATRICES} for e in range(moe.num_experts)]
    result = dict(tensors)
    report = []
    needed = svd == "whitened" and any(any(r.values()) for r in by_expert)
    statistics = _moments(moe, seen, weighted) if needed else ((e, None) for e in range(moe.num_experts))
    for expert, moments in statistics:
        fate = fates[expert] if svd == "whitened" or fates[expert] == "keep" else "vanilla"
        wanted = by_expert[expert] if fate != "keep" else dict.fromkeys(MATRICES, 0)
        entry: dict[str, Any] = {"expert": expert, "tokens": tokens[expert], "ranks": wanted, "lost": {}}
        for m, name, w in zip(MATRICES, family.expert(layer, expert), _matrices(moe.experts[expert]), strict=True):
            if not wanted[m]:
                continue
            check_rank(wanted[m], *w.shape, force=force)
            cut, entry["lost"][m] = _cut(w, wanted[m], moments if fate == "whitened" else None, m, shrink)
            stored = result.pop(name).dtype
            for factor, tensor in zip(family.factors(name), (cut.out_MR, cut.in_RN), strict=True):
                result[factor] = tensor.to(stored).cpu()
        entry["by"] = fate if any(wanted.values()) else "whole"
        report.append(entry)
        context.progress(expert + 1, moe.num_experts, "experts")
    few = [e for e, f in enumerate(fates) if f != "whitened" and (svd == "whitened" or f == "keep")]
    if few:
        what = "stay whole" if policy == "keep" else "are cut by their weights alone"
        context.note(f"layer {layer}: experts {few} saw fewer than {max(least, 1)} tokens and {what}")
    save(result, out)
    return report


def _cut(w_MN: Tensor, rank: int, moments: Moments | None, matrix: str, shrink: float) -> tuple[LowRank, float]:
    """The factors, and the part of the squared norm (of outputs, or of the weights themselves) that went."""
    w_MN = w_MN.float()
    if moments is None:
        cut = vanilla(w_MN, rank)
        return cut, float((w_MN - cut.whole()).square().sum() / w_MN.square().sum().clamp(min=1e-30))
    moment: dict[str, Any] = moments.of(matrix)
    found = components(w_MN, rank=rank, shrink=shrink, **moment)
    total = float(found.energy_K.sum())
    return found.truncated(rank), float(found.error(rank)) ** 2 / total if total else 0.0


def _moments(moe: MoELayer, seen: Sequence[Files], weighted: bool) -> Iterator[tuple[int, Moments]]:
    """The second moments of one expert after the other, over what all shards recorded."""
    shards = [Tensors(s)["x_RD"].to(moe.router_ED.device, moe.router_ED.dtype) for s in seen]
    yield from enumerate(layer_moments(moe, torch.cat(shards), weighted=weighted))


def _matrices(expert: MLP) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, down = expert.gate_FD, expert.up_FD, expert.down_DF
    assert isinstance(gate, Tensor) and isinstance(up, Tensor) and isinstance(down, Tensor)
    return gate, up, down
