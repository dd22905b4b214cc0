"""One layer's subsets weighed on what calibration saw in it, by whichever search: the tensor side of `candidates` and `importance`.

Shapes are suffixes: T tokens, D model width, E experts, S subsets.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moeflow.arch import Config
from moeflow.methods.prune import genetic, swap
from moeflow.methods.prune.errors import mask_of
from moeflow.methods.prune.evaluated import enumerate_all
from moeflow.methods.prune.gram import Weighed, room
from moeflow.methods.prune.subsets import ENUMERATE, Subset, without
from moeflow.methods.recorded import add_stats, layer_of, routed_tokens, sample_of
from moeflow.methods.scores import SCORES, best_by_score
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import Files
from moeflow.model.moe import MoELayer
from moeflow.step import Context

STATE = "state.json"

METHODS: dict[str, Callable[..., list[tuple[Subset, float]]]] = {
    ENUMERATE: enumerate_all,
    "genetic": genetic.search,
    "swap": swap.search,
}
"""Every search over the subsets of one layer, by name."""


@torch.inference_mode()
def search_counts(
    context: Context, config: Config, layer_file: Files, shards: Sequence[Files],
    *, layer: int, counts: Sequence[int], method: str, best: int, options: dict[str, Any], protected: Sequence[int],
    seed: int, dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """The best sets for every count with their losses, absolute and as a part of the output, and those of the baselines."""
    moe = layer_of(Tensors(layer_file), config, layer, dtype)
    most = moe.num_experts - min(counts)
    weighed, stats = _weighed(context, moe, shards, drop_at_most=most)
    groups, experts = moe.router.groups, moe.num_experts
    norm = float(weighed.norm) ** 0.5
    done = _Progress(context, list(counts))
    found: dict[str, Any] = {}
    for keep in counts:
        if str(keep) in done.found:
            found[str(keep)] = done.found[str(keep)]
            continue
        baselines = {n: tuple(best_by_score(score(moe, stats, seed + layer), keep, groups)) for n, score in SCORES.items()}
        more: dict[str, Any] = dict(options)
        if method != ENUMERATE:
            more |= {"seed": seed, "layer": layer}
        if method == "genetic":
            more |= {"save": done.between, "resume": done.state}
        if method == "swap" and not protected:
            more |= {"given": [s for n, s in baselines.items() if n != "random"]}
        sets = METHODS[method](weighed, experts, keep, groups=groups, protected=protected, best=best, **more)
        losses = weighed(mask_of(list(baselines.values()), experts, weighed.norm.device)).tolist()
        found[str(keep)] = {
            "best": [_entry(s, loss, norm) for s, loss in sets],
            "baselines": {n: _entry(s, loss, norm) for (n, s), loss in zip(baselines.items(), losses, strict=True)},
        }
        done.finished(found)
    return {"layer": layer, "experts": experts, "method": method, "tokens": weighed.tokens, "norm": norm, "counts": found}


@torch.inference_mode()
def without_each(
    context: Context, config: Config, layer_file: Files, shards: Sequence[Files], *, layer: int, dtype: str
) -> tuple[list[float], list[int]]:
    """For each expert, the change of the layer's output without it, as a part of that output, and the recorded tokens it got."""
    moe = layer_of(Tensors(layer_file), config, layer, dtype)
    tokens = routed_tokens(moe, shards)
    if not moe.router.can_spare(moe.num_experts):
        return [0.0] * moe.num_experts, tokens
    weighed, _ = _weighed(context, moe, shards, drop_at_most=1)
    mask_EE = mask_of([without(moe.num_experts, [e]) for e in range(moe.num_experts)], moe.num_experts, weighed.norm.device)
    norm = float(weighed.norm) ** 0.5
    return [float(loss) / norm if norm else 0.0 for loss in weighed(mask_EE)], tokens


class _Progress:
    """What a search has found so far, kept so that an interrupted one goes on from there."""

    def __init__(self, context: Context, counts: list[int]) -> None:
        self.context, self.counts = context, counts
        folder = context.resume()
        kept = json.loads((folder / STATE).read_text()) if folder else {"found": {}, "state": None}
        self.found, self.state = kept["found"], kept["state"]

    def between(self, state: dict[str, Any]) -> None:
        """Keep the state of the count that is being searched, now and then: a generation is cheap."""
        self.context.progress(state["generation"] + 1, 0, "generations")
        if state["generation"] % 10 == 9:
            self._save(state)

    def finished(self, found: dict[str, Any]) -> None:
        self.found, self.state = found, None
        self.context.progress(len(found), len(self.counts), "counts")
        self._save(None)

    def _save(self, state: dict[str, Any] | None) -> None:
        folder = self.context.scratch / "state"
        folder.mkdir(exist_ok=True)
        (folder / STATE).write_text(json.dumps({"found": self.found, "state": state}))
        self.context.save(folder)


def _weighed(context: Context, moe: MoELayer, shards: Sequence[Files], *, drop_at_most: int) -> tuple[Weighed, dict[str, Tensor]]:
    """The layer prepared on an equal part of each shard's tokens, as far as there is room, and the shards' summed statistics."""
    seen = [Tensors(s) for s in shards]
    each = room(moe, drop_at_most) // len(seen)
    inputs = (sample_of(s)[:each].to(moe.router_ED.device, moe.router_ED.dtype) for s in seen)
    weighed = Weighed.of(moe, inputs, drop_at_most=drop_at_most)
    left = sum(max(0, int(s["sample"]) - each) for s in seen)
    if left:
        context.note(f"weighed on {weighed.tokens:,} tokens: there was no room for {left:,} more")
    return weighed, add_stats(seen)


def _entry(subset: Subset, loss: float, norm: float) -> dict[str, Any]:
    return {"keep": list(subset), "loss": loss, "of_output": loss / norm if norm else 0.0}
