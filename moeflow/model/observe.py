"""Record statistics of an MoE layer while it runs: router logits, sums per expert, and the inputs of some tokens.

Shapes are suffixes: N sequences, L positions, T tokens, D model width, E experts, k experts a token, R recorded tokens. All sums
are fp64 and additive over shards of tokens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeflow.arch import Family
from moeflow.model.checkpoint import activation
from moeflow.model.factors import experts_in_memory
from moeflow.model.moe import MoELayer
from moeflow.model.routed_experts import RoutedExperts
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

    def __init__(self, family: Family, moe: MoELayer, recording: Recording) -> None:
        """`moe` is the layer without its experts."""
        self.family, self.moe, self.recording = family, moe, recording
        self.experts = len(moe.router_ED)
        self.tokens = 0
        sums = ("count", "weight", "score", "norm", "reap", "reap_sq", "max")
        self.sums = {name: torch.zeros(self.experts, dtype=torch.float64) for name in sums}
        self.totals = {n: torch.zeros((), dtype=torch.float64) for n in ("output_sq", "cos_block", "cos_layer")}
        self.rows: dict[str, list[Tensor]] = {"logits_TE": [], "x_RD": [], "position_R": []}
        self.adds = True  # so far, the block's output is added to its residual as it is
        self._beside: list[Tensor] = []
        self._now: dict[str, Tensor] = {}

    @contextmanager
    def on(self, layer: nn.Module) -> Iterator[None]:
        """Record what runs through this decoder layer inside the `with` statement."""
        norm, block = (layer.get_submodule(name) for name in (self.family.arch.norm, self.family.arch.block))
        experts: Any = block.get_submodule("experts")
        experts.recorder = self
        hooks = [
            norm.register_forward_pre_hook(lambda _, args, named: self._hold("residual", first_of(args, named)), with_kwargs=True),
            block.register_forward_pre_hook(lambda _, args, named: self._hold("x", first_of(args, named)), with_kwargs=True),
            block.register_forward_hook(lambda _, args, out: self._block(experts, first_of(out))),
            layer.register_forward_hook(lambda _, args, out: self._layer(args[0], first_of(out))),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def pairs(self, y_TkD: Tensor, index_Tk: Tensor, weights_Tk: Tensor, of_input_Tk: Tensor | None = None) -> None:
        """Add the outputs of routed (token, expert) pairs to the sums. The index `experts` marks a pair that was skipped.

        `weights_Tk` are the weights of these outputs, `of_input_Tk` those that their inputs were multiplied with, if they were.
        """
        norm_Tk = torch.linalg.vector_norm(y_TkD, dim=-1, dtype=torch.float32).double()
        weights_Tk = weights_Tk.double()
        flat = index_Tk.reshape(-1)
        # one place more than there are experts, for pairs that were skipped
        zeros = torch.zeros(self.experts + 1, dtype=torch.float64, device=flat.device)

        def add(name: str, value_Tk: Tensor) -> None:
            self.sums[name] += zeros.index_add(0, flat, value_Tk.reshape(-1))[:-1].cpu()

        reap_Tk = weights_Tk * norm_Tk
        add("count", torch.ones_like(norm_Tk))
        add("weight", weights_Tk if of_input_Tk is None else of_input_Tk.double())
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

    def beside(self) -> Tensor:
        """What the block's output was added to, [R, D], of the tokens that `recording.beside` asks for.

        None of them if this layer does anything else with the output, such as norming or scaling it.
        """
        rows_RD = torch.cat(self._beside)
        return rows_RD if self.adds else rows_RD[:0].clone()

    def _hold(self, name: str, value: Tensor) -> None:
        self._now[name] = value.flatten(0, -2)

    def _block(self, experts: nn.Module, out_NLD: Tensor) -> None:
        x_TD, out_TD = self._now["x"], out_NLD.flatten(0, -2)
        self._now["out"] = out_TD
        logits_TE = self.moe.logits(x_TD)
        if "index" not in self._now:
            self._own_pairs(experts, x_TD, logits_TE)
        self.sums["score"] += self.moe.router.scores(logits_TE).sum(0, dtype=torch.float64).cpu()
        self.totals["output_sq"] += out_TD.float().square().sum(dtype=torch.float64).cpu()
        self.rows["logits_TE"].append(logits_TE.float().cpu())
        keep = self._kept(len(x_TD))
        self.rows["position_R"].append(keep.cpu() + self.tokens)
        self.rows["x_RD"].append(x_TD[keep].cpu())
        self.tokens += len(x_TD)

    def _own_pairs(self, experts: nn.Module, x_TD: Tensor, logits_TE: Tensor) -> None:
        """Compute the outputs of the routed pairs here, where a family's experts run on all tokens and show none."""
        router = self.moe.router
        weights_Tk, index_Tk = router.choose(logits_TE)
        y_TkD = x_TD.new_zeros(*index_Tk.shape, x_TD.shape[1])
        act = activation(self.family.config)
        each = experts.mlps(act) if isinstance(experts, RoutedExperts) else experts_in_memory(experts, act)
        for e, expert in enumerate(each):
            token, slot = torch.where(index_Tk == e)
            y_TkD[token, slot] = expert(self.moe.expert_input(x_TD[token], logits_TE[token], e))
        of_input = router.scores(logits_TE).gather(-1, index_Tk) if router.arch.weighs_input else None
        self.pairs(y_TkD, index_Tk, weights_Tk, of_input)

    def _layer(self, before: Tensor, after: Tensor) -> None:
        after_TD = after.flatten(0, -2)
        # behind the block comes nothing but the sum with the residual, or what belongs to the block
        self.totals["cos_block"] += _cosines(self._now["residual"], after_TD)
        self.totals["cos_layer"] += _cosines(before.flatten(0, -2), after_TD)
        if self.recording.beside[0]:
            self._keep_beside(after_TD)
        self._now = {}

    def _keep_beside(self, after_TD: Tensor) -> None:
        residual_TD, out_TD = self._now["residual"], self._now["out"]
        self.adds = self.adds and is_sum(after_TD, residual_TD, out_TD)
        taken, of = self.recording.beside
        place_T = torch.arange(self.tokens - len(after_TD), self.tokens, device=after_TD.device)
        self._beside.append(residual_TD[place_T % of < taken].cpu())

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


def first_of(values: Any, named: Mapping[str, Any] | None = None) -> Tensor:
    """The hidden states among what a module takes or returns: the first value, or the one that is called so."""
    if not isinstance(values, tuple):
        return values
    return values[0] if values else next(iter(named.values()))  # type: ignore[union-attr]


def is_sum(sum_TD: Tensor, *parts_TD: Tensor) -> bool:
    """Whether these rows are the sum of others, within the rounding of their precision."""
    largest_TD = torch.stack([p.float().abs() for p in parts_TD]).amax(0)
    apart_TD = (sum_TD.float() - sum(p.float() for p in parts_TD)).abs()
    return bool((apart_TD <= 4 * torch.finfo(sum_TD.dtype).eps * largest_TD).all())


def _cosines(a_TD: Tensor, b_TD: Tensor) -> Tensor:
    return cosine_similarity(a_TD.float(), b_TD.float(), dim=-1).sum(dtype=torch.float64).cpu()
