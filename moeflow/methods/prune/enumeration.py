"""Choose one layer's experts by comparing every subset, as NAEE does (Lu et al., ACL 2024, section 3.2), or by a score.

Shapes are suffixes: T tokens, D model width, E experts, S subsets, B batches.
"""

from collections.abc import Sequence

import torch

from moeflow.arch import Config
from moeflow.methods.prune.errors import mask_of, squared_errors, squared_errors_direct
from moeflow.methods.prune.searches import ENUMERATE, Search
from moeflow.methods.prune.subsets import Subsets
from moeflow.methods.recorded import add_stats, layer_of, sample_of
from moeflow.methods.records import Choice, ExpertSet, LayerLoss
from moeflow.methods.scores.functions import baselines
from moeflow.model.alternatives import slices
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import Files
from moeflow.step import Context


@torch.inference_mode()
def weigh(
    context: Context, config: Config, layer_file: Files, shards: Sequence[Files], originals: Sequence[Files],
    *, layer: int, keep: int, how: Search, batch_tokens: int | None, dtype: str,
) -> Choice:  # fmt: skip
    """Choose one layer's experts; returns the losses of the chosen set, of the runner-up and of the set that each score would keep.

    `shards`: what each shard of tokens recorded in this layer; `originals`: what the same tokens recorded there in the original
    model. With `originals`, the original layer's output on them is the target. A batch has `batch_tokens` tokens, or a whole shard
    if that is None. Raises ValueError if an output is NaN or infinite.
    """
    moe = layer_of(Tensors(layer_file), config, layer, dtype)
    device, precise, experts = moe.router_ED.device, moe.router_ED.dtype, moe.num_experts
    recorded = [Tensors(s) for s in shards]
    by_score = baselines(moe, add_stats(recorded), how.seed + layer, keep)
    exact = how.method == ENUMERATE
    subsets = list(Subsets(experts, keep, moe.router.groups)) if exact else list(dict.fromkeys(by_score.values()))
    mask_SE = mask_of(subsets, experts, device)
    evaluate = squared_errors if len(subsets) * moe.router.top_k > experts else squared_errors_direct
    errors_B, square, norms, tokens = [], 0.0, 0.0, 0
    for at, shard in enumerate(recorded):
        x_TD = sample_of(shard)
        goal_TD = sample_of(Tensors(originals[at])) if originals else None
        for rows in slices(len(x_TD), batch_tokens or len(x_TD)):
            target_tD = None if goal_TD is None else moe(goal_TD[rows].to(device, precise))
            error_S, out_sq = evaluate(moe, x_TD[rows].to(device, precise), mask_SE, target_tD)
            errors_B.append(error_S.cpu())
            square += float(out_sq)
            norms += float(out_sq) ** 0.5
        tokens += len(x_TD)
        context.progress(at + 1, len(recorded), "shards")
    errors_BS = torch.stack(errors_B)
    loss_S = errors_BS.sqrt().sum(0) if how.loss == "batch-sum" else errors_BS.sum(0).sqrt()
    if not loss_S.isfinite().all():
        raise ValueError(f"layer {layer} gives outputs that are NaN or infinite; compute in another precision (dtype=float32)")
    norm = norms if how.loss == "batch-sum" else square**0.5
    sets = {subset: ExpertSet.of(subset, loss, norm) for subset, loss in zip(subsets, loss_S.tolist(), strict=True)}
    picked = min(sets.values(), key=lambda s: s.loss) if exact else sets[by_score[how.method]]
    runner_up = min((s for s in sets.values() if s is not picked), key=lambda s: s.loss, default=None) if exact else None
    loss = LayerLoss(how.loss, picked.loss, picked.of_output, tokens)
    by_name = {name: sets[subset] for name, subset in by_score.items()}
    losses = {",".join(map(str, s.keep)): s.loss for s in sets.values()}
    return Choice(layer, experts, picked.keep, how.method, loss, runner_up, by_name, losses)
