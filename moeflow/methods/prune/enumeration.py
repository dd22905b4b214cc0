"""Weigh subsets of one layer's experts against each other on calibration tokens: the tensor side of `choose`.

Shapes are suffixes: T tokens, D model width, E experts, S subsets, B batches.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moeflow.arch import Config
from moeflow.methods.prune.errors import mask_of, squared_errors, squared_errors_direct
from moeflow.methods.prune.subsets import ENUMERATE, Subset, all_subsets
from moeflow.methods.recorded import add_stats, layer_of, sample_of
from moeflow.methods.scores import SCORES, best_by_score
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import Files
from moeflow.step import Context


@torch.inference_mode()
def weigh(
    context: Context, config: Config, layer_file: Files, shards: Sequence[Files], originals: Sequence[Files],
    *, layer: int, keep: int, criterion: str, loss: str, batch_tokens: int, seed: int, dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """The choice for one layer, with the loss of what was chosen, of the runner-up and of the baselines, as it is stored.

    `shards`: what each shard of tokens showed in this layer; `originals`: what the same tokens show in it without a pruned prefix,
    where the target is the original's output.
    """
    moe = layer_of(Tensors(layer_file), config, layer, dtype)
    device, precise = moe.router_ED.device, moe.router_ED.dtype
    groups, experts = moe.router.groups, moe.num_experts
    seen = [Tensors(s) for s in shards]
    stats = add_stats(seen)
    baselines = {n: tuple(best_by_score(score(moe, stats, seed + layer), keep, groups)) for n, score in SCORES.items()}
    subsets = list(all_subsets(experts, keep, groups)) if criterion == ENUMERATE else list(dict.fromkeys(baselines.values()))
    mask_SE = mask_of(subsets, experts, device)
    evaluate = squared_errors if len(subsets) * moe.router.top_k > experts else squared_errors_direct
    errors_B, square, norms, tokens = [], 0.0, 0.0, 0
    for at, shard in enumerate(seen):
        x_TD = sample_of(shard)
        goal_TD = sample_of(Tensors(originals[at])) if originals else None
        for rows in _batches(len(x_TD), batch_tokens):
            target_tD = None if goal_TD is None else moe(goal_TD[rows].to(device, precise))
            error_S, out_sq = evaluate(moe, x_TD[rows].to(device, precise), mask_SE, target_tD)
            errors_B.append(error_S.cpu())
            square += float(out_sq)
            norms += float(out_sq) ** 0.5
        tokens += len(x_TD)
        context.progress(at + 1, len(seen), "shards")
    errors_BS = torch.stack(errors_B)
    loss_S = errors_BS.sqrt().sum(0) if loss == "batch-sum" else errors_BS.sum(0).sqrt()
    if not loss_S.isfinite().all():
        raise ValueError(f"layer {layer} gives outputs that are NaN or infinite; compute in another precision (dtype=float32)")
    losses = dict(zip(subsets, loss_S.tolist(), strict=True))
    picked = min(losses, key=lambda s: losses[s]) if criterion == ENUMERATE else baselines[criterion]
    others = sorted((s for s in losses if s != picked), key=lambda s: losses[s])
    norm = norms if loss == "batch-sum" else square**0.5

    def entry(subset: Subset) -> dict[str, Any]:
        return {"keep": list(subset), "loss": losses[subset], "of_output": losses[subset] / norm if norm else 0.0}

    return {
        "layer": layer,
        "experts": experts,
        "keep": list(picked),
        "criterion": criterion,
        "loss": {"kind": loss, "value": losses[picked], "of_output": entry(picked)["of_output"], "tokens": tokens},
        "runner_up": entry(others[0]) if others and criterion == ENUMERATE else None,
        "baselines": {name: entry(subset) for name, subset in baselines.items()},
        "losses": {",".join(map(str, s)): v for s, v in losses.items()},
    }


def _batches(rows: int, size: int) -> Iterator[slice]:
    for at in range(0, rows, size or rows):
        yield slice(at, at + (size or rows))
