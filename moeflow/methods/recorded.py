"""Read what a calibration recorded in one layer: statistics added over shards, inputs, and the layer itself.

Shapes are suffixes: T tokens, R recorded tokens, D model width, E experts, k experts a token.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from moeflow.arch import Config
from moeflow.methods.scores import SCORES
from moeflow.model.checkpoint import Tensors, read_moe
from moeflow.model.layout import Files
from moeflow.model.moe import MoELayer
from moeflow.model.spec import precision


def add_stats(shards: Sequence[Tensors], names: Iterable[str] = ()) -> dict[str, Tensor]:
    """Add one layer's named statistics over all its shards; without names, all that the scores need.

    Sums are added; "max_E", each expert's largest value, becomes the maximum over shards.
    """
    wanted = tuple(names) or sorted({name for score in SCORES.values() for name in score.needs})
    together = {name: torch.stack([s[name] for s in shards]) for name in wanted}
    return {name: values.amax(0) if name == "max_E" else values.sum(0) for name, values in together.items()}


def needed(shards: Sequence[Files], names: Sequence[str]) -> dict[str, Tensor]:
    """What a score needs of one layer, added over all its shards; nothing for one that needs nothing."""
    return add_stats([Tensors(s) for s in shards], names) if names else {}


def counted(shards: Sequence[Files]) -> float:
    """The mean number of the layer's experts that compute a token of these shards."""
    stats = add_stats([Tensors(s) for s in shards], ("count_E", "tokens"))
    return float(stats["count_E"].sum() / stats["tokens"])


def layer_of(tensors: Tensors, config: Config, layer: int, dtype: str) -> MoELayer:
    """One layer's MoE block in the precision of the run, on a GPU if there is one."""
    return read_moe(tensors, config, layer).to(**placement(config, dtype))


def placement(config: Config, dtype: str) -> dict[str, Any]:
    """The `device` and `dtype` of the run's tensors: a GPU if there is one, and the precision of the run."""
    return {"device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": getattr(torch, precision(config, dtype))}


def routed_tokens(moe: MoELayer, shards: Sequence[Files]) -> list[int]:
    """How many of the recorded tokens the layer's router sends to each expert."""
    count_E = torch.zeros(moe.num_experts, dtype=torch.int64)
    for shard in shards:
        x_RD = Tensors(shard)["x_RD"].to(moe.router_ED.device, moe.router_ED.dtype)
        _, index_Rk = moe.router.choose(moe.logits(x_RD))
        count_E += index_Rk.flatten().cpu().bincount(minlength=moe.num_experts)
    return count_E.tolist()


def sample_of(shard: Tensors) -> Tensor:
    """The MoE inputs [T, D] of the shard's first tokens, in order, without the tokens that were recorded for a rare expert."""
    return shard["x_RD"][: int(shard["sample"])]
