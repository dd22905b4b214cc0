"""A MoE layer with low-rank experts beside the dense layer it was made of.

Layer: transformers' `MixtralSparseMoeBlock`, d=1024, F=2816, 16 experts, top-2, bf16, one thread, with its default implementation
of experts; every matrix of every expert at half its break-even rank (375 of 751), or the experts at half to one and a half times
that, as ranks come out of one budget for a whole model. Prefill is 2,048 tokens, decode one token of each of 1 and 16 sequences.
Medians of alternating rounds. Half the products is twice the speed at best; what is beyond that comes from how they are computed:
on processors without bf16 instructions ours run in fp32. The same code with whole matrices tells the two apart.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.rows import Row
from moeflow.model.formats import Format
from moeflow.model.routed_experts import RoutedExperts

D, F, E, TOP_K = 1024, 2816, 16, 2
RANK = F * D // (F + D) // 2
UNEVEN = tuple(RANK // 2 + RANK * (7 * e % E) // (E - 1) for e in range(E))
PREFILL, ROUNDS = 2048, {1: 61, 16: 15, 2048: 3}


def block(experts: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Mixtral's block with these experts in place of its own, all weights random."""
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=TOP_K)
    config._experts_implementation = "grouped_mm"  # what transformers chooses by itself
    made = MixtralSparseMoeBlock(config).bfloat16()
    made.experts = experts(made.experts).bfloat16()
    for parameter in made.parameters():
        parameter.data.normal_(std=0.02)
    return made.eval()


def medians(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, run in turn round after round after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for at in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if at:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


@torch.inference_mode()
def main(threads: int = 1) -> list[Row]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    half, uneven = Format(E, *((RANK,) * E,) * 3), Format(E, UNEVEN, UNEVEN[::-1], UNEVEN)
    blocks = {
        "dense": block(lambda own: own),
        "whole": block(lambda own: RoutedExperts(Format(E), own.hidden_dim, own.intermediate_dim, own.act_fn)),
        "low-rank": block(lambda own: RoutedExperts(half, own.hidden_dim, own.intermediate_dim, own.act_fn)),
        "uneven": block(lambda own: RoutedExperts(uneven, own.hidden_dim, own.intermediate_dim, own.act_fn)),
    }
    resident = sum(p.numel() for p in blocks["uneven"].experts.parameters())  # type: ignore[union-attr]
    at_rest = sum(rank * (D + F) for of in (uneven.gate, uneven.up, uneven.down) for rank in of)
    rows = [Row("experts of uneven ranks in memory, against the bytes at rest", resident / at_rest, "at most", 1.08, "times")]
    for tokens, rounds in ROUNDS.items():
        x_1TD = torch.randn(1, tokens, D, dtype=torch.bfloat16)
        took = medians({n: partial(b, x_1TD) for n, b in blocks.items()}, rounds)
        what = f"prefill of {tokens:,} tokens" if tokens == PREFILL else f"decode of batch {tokens}"
        least = 1.7 if tokens == PREFILL else 1.3
        rows += [
            _row(f"{what}, against transformers' dense layer", took["dense"] / took["low-rank"], least),
            _row(f"{what}, against our own code with whole matrices", took["whole"] / took["low-rank"], least),
            _row(f"{what}, uneven ranks, against transformers' dense layer", took["dense"] / took["uneven"], least),
        ]
    torch.set_num_threads(before)
    return rows


def _row(name: str, ratio: float, least: float) -> Row:
    return Row(f"layer at half its break-even rank, {name}", ratio, "at least", least, "times faster")
