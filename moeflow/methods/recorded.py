"""Weigh subsets of one layer's experts against each other on calibration tokens: the tensor side of `choose`.

Shapes are suffixes: T tokens, D model width, E experts, S subsets, B batches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeflow.arch import Config
from moeflow.model.checkpoint import Tensors, read_moe
from moeflow.model.layout import Files
from moeflow.model.moe import MoELayer
from moeflow.model.spec import precision

STATS = ("count_E", "weight_E", "score_E", "norm_E", "reap_E", "reap_sq_E", "tokens")


def add_stats(shards: Sequence[Tensors]) -> dict[str, Tensor]:
    """The sums of all shards of one layer, added; the largest values, compared."""
    total = {name: torch.stack([s[name] for s in shards]).sum(0) for name in STATS}
    total["max_E"] = torch.stack([s["max_E"] for s in shards]).amax(0)
    return total


def counted(shards: Sequence[Files]) -> float:
    """How many experts a token of these shards was computed by in the layer, on average."""
    seen = [Tensors(s) for s in shards]
    return float(sum(s["count_E"].sum() for s in seen) / sum(s["tokens"] for s in seen))


def layer_of(tensors: Tensors, config: Config, layer: int, dtype: str) -> MoELayer:
    """One layer's MoE block in the precision of the run, on a GPU where there is one."""
    return read_moe(tensors, config, layer).to(**placement(config, dtype))


def placement(config: Config, dtype: str) -> dict[str, Any]:
    """`device` and `dtype` of the run's tensors: its precision, on a GPU where there is one."""
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
    """The MoE inputs [T, D] of the shard's first tokens, in order, without those that are there for a rare expert."""
    return shard["x_RD"][: int(shard["sample"])]
