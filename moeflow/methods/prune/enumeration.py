"""Choose one layer's experts by comparing every subset, as NAEE does (Lu et al., ACL 2024, section 3.2), or by a score.

Shapes are suffixes: T tokens, D model width, E experts, S subsets, B batches.
"""

from collections.abc import Iterable, Sequence
from math import isfinite

import torch

from moeflow.arch import Config, Family
from moeflow.methods.graph import load
from moeflow.methods.prune.errors import mask_of, squared_errors, squared_errors_by_expert
from moeflow.methods.prune.searches import Search
from moeflow.methods.prune.subsets import Subset, Subsets
from moeflow.methods.recorded import add_stats, layer_of, needed, sample_of
from moeflow.methods.records import Choice, ExpertSet, LayerLoss
from moeflow.methods.scores import SCORES
from moeflow.methods.scores.functions import baselines, best_by_score
from moeflow.model.alternatives import slices
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import Files
from moeflow.model.moe import MoELayer
from moeflow.step import Context


@torch.inference_mode()
def enumerate_layer(
    context: Context, config: Config, layer_file: Files, shards: Sequence[Files], originals: Sequence[Files],
    *, layer: int, keep: int, how: Search, batch_tokens: int | None, dtype: str,
) -> Choice:  # fmt: skip
    """Choose the best of all subsets of one layer's experts; returns its loss, the runner-up's and those of the scores' sets.

    `shards`: what each shard of tokens recorded in this layer; `originals`: what the same tokens recorded there in the original
    model. With `originals`, the original layer's output on them is the target. A batch has `batch_tokens` tokens, or a whole shard
    if that is None. Raises ValueError if an output is NaN or infinite.
    """
    moe = layer_of(Tensors(layer_file), config, layer, dtype)
    recorded = [Tensors(s) for s in shards]
    by_score = baselines(moe, add_stats(recorded), how.seed + layer, keep)
    subsets = list(Subsets(moe.num_experts, keep, moe.router.groups))
    sets, tokens = _losses(context, moe, recorded, [Tensors(o) for o in originals], subsets, how.loss, batch_tokens)
    _check_finite(layer, [s.loss for s in sets.values()])
    picked = min(sets.values(), key=lambda s: s.loss)
    runner_up = min((s for s in sets.values() if s is not picked), key=lambda s: s.loss, default=None)
    loss = LayerLoss(how.loss, picked.loss, picked.of_output, tokens)
    by_name = {name: sets[subset] for name, subset in by_score.items()}
    losses = {",".join(map(str, s.keep)): s.loss for s in sets.values()}
    return Choice(layer, moe.num_experts, picked.keep, how.method, loss, runner_up, by_name, losses)


@torch.inference_mode()
def by_score(
    context: Context, config: Config, layer_file: Files, shards: Sequence[Files], originals: Sequence[Files],
    *, layer: int, keep: int, how: Search, dtype: str,
) -> Choice:  # fmt: skip
    """Choose the experts of one layer with the highest score, from the calibration's statistics or the weights.

    No loss is measured unless `how.measured` asks for it: then those of all scores' sets are, on about so many tokens, equally many
    of each shard. The files are as in `enumerate_layer`.
    """
    recorded, score = [Tensors(s) for s in shards], SCORES[how.method]
    moe = layer_of(Tensors(layer_file), config, layer, dtype) if score.weights or how.measured else None
    if moe is None or not how.measured:
        score_E = load(score.code)(moe, needed(shards, score.needs), how.seed + layer)
        _check_finite(layer, score_E.tolist())
        picked = tuple(best_by_score(score_E, keep, Family.of(config).group_limit[0]))
        return Choice(layer, len(score_E), picked, how.method, None, None, {})
    by_name = baselines(moe, add_stats(recorded), how.seed + layer, keep)
    subsets, each = list(dict.fromkeys(by_name.values())), -(-how.measured // len(recorded))
    sets, tokens = _losses(context, moe, recorded, [Tensors(o) for o in originals], subsets, how.loss, None, each)
    _check_finite(layer, [s.loss for s in sets.values()])
    picked = by_name[how.method]
    loss = LayerLoss(how.loss, sets[picked].loss, sets[picked].of_output, tokens)
    return Choice(layer, moe.num_experts, picked, how.method, loss, None, {name: sets[s] for name, s in by_name.items()})


def _losses(
    context: Context, moe: MoELayer, recorded: Sequence[Tensors], originals: Sequence[Tensors], subsets: Sequence[Subset],
    kind: str, batch_tokens: int | None, most: int | None = None,
) -> tuple[dict[Subset, ExpertSet], int]:  # fmt: skip
    """Every subset with its loss on the recorded tokens, `most` of each shard or all, and the number of these tokens."""
    device, precise, experts = moe.router_ED.device, moe.router_ED.dtype, moe.num_experts
    mask_SE = mask_of(subsets, experts, device)
    evaluate = squared_errors if len(subsets) * moe.router.top_k > experts else squared_errors_by_expert
    errors_B, square, norms, tokens = [], 0.0, 0.0, 0
    for at, shard in enumerate(recorded):
        x_TD = sample_of(shard)[:most]
        goal_TD = sample_of(originals[at])[:most] if originals else None
        for rows in slices(len(x_TD), batch_tokens or len(x_TD)):
            target_tD = None if goal_TD is None else moe(goal_TD[rows].to(device, precise))
            error_S, out_sq = evaluate(moe, x_TD[rows].to(device, precise), mask_SE, target_tD)
            errors_B.append(error_S.cpu())
            square += float(out_sq)
            norms += float(out_sq) ** 0.5
        tokens += len(x_TD)
        context.progress(at + 1, len(recorded), "shards")
    errors_BS = torch.stack(errors_B)
    loss_S = errors_BS.sqrt().sum(0) if kind == "batch-sum" else errors_BS.sum(0).sqrt()
    norm = norms if kind == "batch-sum" else square**0.5
    return {s: ExpertSet.of(s, loss, norm) for s, loss in zip(subsets, loss_S.tolist(), strict=True)}, tokens


def _check_finite(layer: int, values: Iterable[float]) -> None:
    if not all(map(isfinite, values)):
        raise ValueError(f"layer {layer} gives outputs that are NaN or infinite; compute in another precision (dtype=float32)")
