"""Record statistics of an MoE layer while it runs: router logits, sums per expert, and the inputs of some tokens.

Shapes are suffixes: N sequences, L positions, T tokens, D model width, E experts, k experts a token, R recorded tokens. All sums
are fp64 and additive over shards of tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeflow.arch import Family
from moeflow.model.router import Router
from moeflow.model.spec import Recording
from moeflow.model.stream import EXPERTS

OBSERVED = "moeflow_observed"
"""The implementation of fused experts that shows a `Recorder` the output of every routed pair."""


def _observed_experts(module: nn.Module, x_TD: Tensor, index_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    """Compute each (token, expert) pair by itself, then the weighted sum. Equal to the standard implementation bit for bit."""
    tokens, k = index_Tk.shape
    pairs_x = x_TD.repeat_interleave(k, dim=0)
    y = ALL_EXPERTS_FUNCTIONS[EXPERTS](module, pairs_x, index_Tk.reshape(-1, 1), x_TD.new_ones(tokens * k, 1))
    y_TkD = y.view(tokens, k, -1)
    module.recorder.pairs(y_TkD, index_Tk, weights_Tk)  # type: ignore[operator, union-attr]
    return (y_TkD * weights_Tk.unsqueeze(-1)).sum(dim=1).to(x_TD.dtype)


ALL_EXPERTS_FUNCTIONS.register(OBSERVED, _observed_experts)


class Recorder:
    """The statistics of one MoE layer over the tokens of one shard, batch by batch in order.

    It keeps the inputs of the first `recording.inputs` tokens, and after them those of tokens that are routed to an expert with
    fewer than `recording.per_expert` tokens so far.
    """

    def __init__(self, family: Family, router: Router, experts: int, recording: Recording) -> None:
        self.family, self.router, self.experts, self.recording = family, router, experts, recording
        self.tokens = 0
        sums = ("count", "weight", "score", "norm", "reap", "reap_sq", "max")
        self.sums = {name: torch.zeros(experts, dtype=torch.float64) for name in sums}
        self.totals = {n: torch.zeros((), dtype=torch.float64) for n in ("output_sq", "cos_block", "cos_layer")}
        self.rows: dict[str, list[Tensor]] = {"logits_TE": [], "x_RD": [], "position_R": []}
        self._now: dict[str, Tensor] = {}

    @contextmanager
    def on(self, layer: nn.Module) -> Iterator[None]:
        """Record what runs through this decoder layer inside the `with` statement."""
        norm, block = (layer.get_submodule(name) for name in (self.family.arch.norm, self.family.arch.block))
        router = block.get_submodule(self.family.arch.block_router)
        block.get_submodule("experts").recorder = self  # type: ignore[assignment]
        hooks = [
            norm.register_forward_pre_hook(lambda _, args: self._hold("residual", args[0])),
            router.register_forward_hook(lambda _, args, out: self._hold("logits", out[0])),
            block.register_forward_hook(lambda _, args, out: self._block(args[0], out)),
            layer.register_forward_hook(lambda _, args, out: self._layer(args[0], out)),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def pairs(self, y_TkD: Tensor, index_Tk: Tensor, weights_Tk: Tensor) -> None:
        """Add the outputs of routed (token, expert) pairs to the sums. The index `experts` marks a pair that was skipped."""
        norm_Tk = torch.linalg.vector_norm(y_TkD, dim=-1, dtype=torch.float32).double()
        weights_Tk = weights_Tk.double()
        flat = index_Tk.reshape(-1)
        # one place more than there are experts, for pairs that were skipped
        zeros = torch.zeros(self.experts + 1, dtype=torch.float64, device=flat.device)

        def add(name: str, value_Tk: Tensor) -> None:
            self.sums[name] += zeros.index_add(0, flat, value_Tk.reshape(-1))[:-1].cpu()

        reap_Tk = weights_Tk * norm_Tk
        add("count", torch.ones_like(norm_Tk))
        add("weight", weights_Tk)
        add("norm", norm_Tk)
        add("reap", reap_Tk)
        add("reap_sq", reap_Tk.square())
        largest = zeros.scatter_reduce(0, flat, reap_Tk.reshape(-1), "amax")
        self.sums["max"] = torch.maximum(self.sums["max"], largest[:-1].cpu())
        self._now["index"] = index_Tk

    def result(self) -> dict[str, Tensor]:
        """Everything recorded: `logits_TE`, `x_RD`, `position_R` in the shard, sums `<name>_E`, and totals.

        The first `sample` rows are the first tokens in order. The other rows are kept for their rare experts.
        """
        counts = {"tokens": self.tokens, "sample": min(self.tokens, self.recording.inputs)}
        return (
            {name: torch.cat(rows) for name, rows in self.rows.items()}
            | {f"{name}_E": sums for name, sums in self.sums.items()}
            | self.totals
            | {name: torch.tensor(count) for name, count in counts.items()}
        )

    def _hold(self, name: str, value: Tensor) -> None:
        self._now[name] = value.flatten(0, -2)

    def _block(self, x_NLD: Tensor, out_NLD: Tensor) -> None:
        x_TD, out_TD = x_NLD.flatten(0, -2), out_NLD.flatten(0, -2)
        residual_TD, logits_TE = self._now["residual"], self._now["logits"]
        self.sums["score"] += self.router.scores(logits_TE).sum(0, dtype=torch.float64).cpu()
        self.totals["output_sq"] += out_TD.float().square().sum(dtype=torch.float64).cpu()
        self.totals["cos_block"] += _cosines(residual_TD, residual_TD + out_TD)
        self.rows["logits_TE"].append(logits_TE.float().cpu())
        keep = self._kept(len(x_TD))
        self.rows["position_R"].append(keep.cpu() + self.tokens)
        self.rows["x_RD"].append(x_TD[keep].cpu())
        self.tokens += len(x_TD)

    def _layer(self, before: Tensor, after: Tensor) -> None:
        self.totals["cos_layer"] += _cosines(before.flatten(0, -2), after.flatten(0, -2))

    def _kept(self, tokens: int) -> Tensor:
        """The tokens of the batch whose inputs are kept, ascending."""
        index_Tk = self._now["index"]
        first = torch.arange(tokens, device=index_Tk.device) < self.recording.inputs - self.tokens
        if self.recording.per_expert:
            chosen_TE = index_Tk.new_zeros(tokens, self.experts + 1).scatter_(1, index_Tk, 1)[:, :-1]
            before_E = (self.sums["count"].to(chosen_TE.device) - chosen_TE.sum(0)).long()
            nth_TE = before_E + chosen_TE.cumsum(0)  # how often each expert was chosen, this token counted
            first |= ((nth_TE <= self.recording.per_expert) & (chosen_TE == 1)).any(1)
        return first.nonzero().squeeze(1)


def _cosines(a_TD: Tensor, b_TD: Tensor) -> Tensor:
    return cosine_similarity(a_TD.float(), b_TD.float(), dim=-1).sum(dtype=torch.float64).cpu()
