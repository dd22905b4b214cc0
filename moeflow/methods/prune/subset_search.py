"""The best sets of one layer's experts by any search, and its experts' importance, on a calibration's recorded tokens.

Shapes are suffixes: E experts.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch

from moeflow import options
from moeflow.arch import Config
from moeflow.methods.graph import load
from moeflow.methods.prune.errors import mask_of
from moeflow.methods.prune.gram import Weighed, room
from moeflow.methods.prune.searches import SUBSET_SEARCHES, Search
from moeflow.methods.prune.subsets import Subsets, without
from moeflow.methods.recorded import add_stats, layer_of, routed_tokens, sample_of
from moeflow.methods.records import Candidates, ExpertSet, Importance, Sets
from moeflow.methods.scores.functions import baselines
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import Files
from moeflow.model.moe import MoELayer
from moeflow.step import Context

STATE = "state.json"


@torch.inference_mode()
def search_counts(
    context: Context, config: Config, layer_file: Files, shards: Sequence[Files],
    *, layer: int, keep: Sequence[int], protected: Sequence[int], how: Search, dtype: str,
) -> Candidates:  # fmt: skip
    """The best sets for each number of experts in `keep`, and the sets that the scores would keep, with their losses.

    A search that takes subsets to begin at gets those of the scores, except the random one, unless experts are `protected`. Saves
    finished counts, and the state of a search that can resume. Raises ValueError if a loss is NaN or infinite.
    """
    moe = layer_of(Tensors(layer_file), config, layer, dtype)
    row, experts, stats = SUBSET_SEARCHES[how.method], moe.num_experts, add_stats([Tensors(s) for s in shards])
    weighed = _weighed(context, moe, shards, drop_at_most=experts - min(keep))
    norm = float(weighed.norm) ** 0.5
    progress = _Progress(context, len(keep))
    for count in keep:
        if count in progress.finished:
            continue
        by_score = baselines(moe, stats, how.seed + layer, count)
        more: dict[str, Any] = {"save": progress.save_search, "resume": progress.search} if row.resumes else {}
        if row.begins and not protected:
            more["begin"] = [subset for name, subset in by_score.items() if name != "random"]
        subsets = Subsets(experts, count, moe.router.groups, tuple(protected))
        best = load(row.code)(weighed, subsets, how, layer=layer, **more)
        losses = weighed(mask_of(list(by_score.values()), experts, weighed.norm.device)).tolist()
        scored = {name: ExpertSet.of(subset, loss, norm) for (name, subset), loss in zip(by_score.items(), losses, strict=True)}
        progress.finish(count, Sets(tuple(ExpertSet.of(subset, loss, norm) for subset, loss in best), scored))
    return Candidates(layer, experts, how.method, weighed.tokens, norm, {count: progress.finished[count] for count in keep})


@torch.inference_mode()
def importance_of(
    context: Context, config: Config, layer_file: Files, shards: Sequence[Files], *, layer: int, dtype: str
) -> Importance:
    """For each expert, the relative change of the layer's output without it."""
    moe = layer_of(Tensors(layer_file), config, layer, dtype)
    experts, tokens = moe.num_experts, tuple(routed_tokens(moe, shards))
    if not moe.router.can_spare(experts):
        return Importance(layer, (0.0,) * experts, tokens)
    weighed = _weighed(context, moe, shards, drop_at_most=1)
    mask_EE = mask_of([without(experts, [e]) for e in range(experts)], experts, weighed.norm.device)
    norm = float(weighed.norm) ** 0.5
    return Importance(layer, tuple(loss / norm if norm else 0.0 for loss in weighed(mask_EE).tolist()), tokens)


class _Progress:
    """The sets of the finished counts and the state of the running search, saved so that another run can continue."""

    def __init__(self, context: Context, counts: int) -> None:
        self.context, self.counts = context, counts
        folder = context.resume()
        saved = json.loads((folder / STATE).read_text()) if folder else {"finished": {}, "search": None}
        self.finished = {int(count): options.restored(sets, Sets) for count, sets in saved["finished"].items()}
        self.search: dict[str, Any] | None = saved["search"]

    def save_search(self, state: dict[str, Any]) -> None:
        """Save the state of the running search, every tenth generation only, because generations are cheap."""
        self.context.progress(state["generation"] + 1, 0, "generations")
        if state["generation"] % 10 == 9:
            self._save(state)

    def finish(self, count: int, sets: Sets) -> None:
        self.finished[count], self.search = sets, None
        self.context.progress(len(self.finished), self.counts, "counts")
        self._save(None)

    def _save(self, search: dict[str, Any] | None) -> None:
        folder = self.context.scratch / "state"
        folder.mkdir(exist_ok=True)
        finished = {count: options.plain(sets) for count, sets in self.finished.items()}
        (folder / STATE).write_text(json.dumps({"finished": finished, "search": search}))
        self.context.save(folder)


def _weighed(context: Context, moe: MoELayer, shards: Sequence[Files], *, drop_at_most: int) -> Weighed:
    """The layer, prepared on as many tokens of each shard as fit."""
    recorded = [Tensors(s) for s in shards]
    each = room(moe, drop_at_most) // len(recorded)
    inputs = (sample_of(s)[:each].to(moe.router_ED.device, moe.router_ED.dtype) for s in recorded)
    weighed = Weighed.of(moe, inputs, drop_at_most=drop_at_most)
    if left := sum(max(0, int(s["sample"]) - each) for s in recorded):
        context.note(f"weighed on {weighed.tokens:,} tokens: there was no room for {left:,} more")
    return weighed
