"""The fused experts of one layer that the family's own cannot compute: matrices that are products of two, tokens that do with
fewer experts than the router gives them.

Shapes are suffixes: T tokens, S routed (token, expert) pairs sorted by expert, E experts, M rows, N columns, R rank, D model
width, F expert width, k experts a token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear

from moeflow.arch import Config, arch_of
from moeflow.model.factors import stacks
from moeflow.model.formats import Format
from moeflow.model.reach import CompressedExperts, Scales, Skip

UPCAST_ROWS = 4
"""From this many rows, a product in bf16 runs in fp32 on a processor that has no instructions for bf16: 3 to 6 times faster."""


class RoutedExperts(nn.Module):
    """A layer's routed experts with the call of transformers' own: (x [T, D], index [T, k], weights [T, k]) to [T, D].

    Its parameters are stacks [E, M, N] of equal shape (`factors.Stack`): `gate_up_proj` and `down_proj` of those experts whose
    matrices are whole, `gate_up_in` and `gate_up_out`, `down_in` and `down_out` of the others, padded with zeros to one rank.
    Padding takes part in the products and adds nothing; its gradient is zero, because what it is multiplied with is zero.
    They start as zeros: a loader fills them. `skip` and `compressed`, where the layer has them, say which of a token's experts are
    computed: the others cost nothing. Where `recorder` is set, it is shown what each routed pair computed.
    """

    gate_up_proj: Tensor
    gate_up_in: Tensor
    gate_up_out: Tensor
    down_proj: Tensor
    down_in: Tensor
    down_out: Tensor
    act_fn: Callable[[Tensor], Tensor]

    def __init__(
        self, format: Format, width: int, inner: int, act: Callable[[Tensor], Tensor],
        *, skip: Skip | None = None, compressed: CompressedExperts | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim, self.act_fn = format.experts, width, inner, act
        self.gate_up_low = [rank > 0 for rank in format.ranks("gate")]
        self.down_low = [rank > 0 for rank in format.ranks("down")]
        self.recorder: Any = None
        for stack in stacks(format):
            self.register_parameter(stack.name, nn.Parameter(torch.zeros(stack.shape(format, width, inner))))
        self.skip, self.compressed = skip, compressed

    def forward(self, x_TD: Tensor, index_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        scales = None
        if self.compressed is not None:
            weights_Tk, index_Tk, scales = self.compressed(weights_Tk, index_Tk)
        if self.skip is not None:
            weights_Tk, index_Tk = self.skip(weights_Tk, index_Tk, self.num_experts)
        tokens, k = index_Tk.shape
        expert_S, order_S = index_Tk.reshape(-1).sort()
        # counting by comparison needs no word from the GPU, and works where deterministic algorithms are asked for
        counts_E = (expert_S == torch.arange(self.num_experts, device=expert_S.device)[:, None]).sum(1)
        if self.skip is not None:  # pairs that are left out stand at the end, and go
            computed = int(counts_E.sum())
            expert_S, order_S = expert_S[:computed], order_S[:computed]
        gate_up, inner = self._inputs(x_TD, order_S // k, scales)
        inner_SF = self._either(self.gate_up_low, self._gate_up, self._gate_up_low, gate_up, expert_S, counts_E)
        y_SD = self._either(self.down_low, self._down, self._down_low, (inner(inner_SF),), expert_S, counts_E)
        if len(order_S) < tokens * k:
            y_TkD = y_SD.new_zeros(tokens * k, y_SD.shape[1]).index_copy(0, order_S, y_SD).view(tokens, k, -1)
        else:
            back_S = torch.empty_like(order_S)
            back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
            y_TkD = y_SD[back_S].view(tokens, k, -1)
        if self.recorder is not None:
            self.recorder.pairs(y_TkD, index_Tk, weights_Tk)
        return (y_TkD * weights_Tk.unsqueeze(-1)).sum(dim=1).to(x_TD.dtype)

    def _inputs(
        self, x_TD: Tensor, token_S: Tensor, scales: Scales | None
    ) -> tuple[tuple[Tensor, ...], Callable[[Tensor], Tensor]]:
        """What gate and up are applied to (one tensor where it is the same), and what becomes of what down is applied to."""
        if scales is None:
            return (x_TD[token_S],), lambda inner_SF: inner_SF
        gate_SD = (x_TD * scales.gate).to(x_TD.dtype)[token_S]
        if scales.inner is None:
            return (gate_SD,), lambda inner_SF: inner_SF
        scale_TF = scales.inner
        return (gate_SD, (x_TD * scales.up).to(x_TD.dtype)[token_S]), lambda inner_SF: (inner_SF * scale_TF[token_S]).to(
            inner_SF.dtype
        )

    def _either(
        self, low: list[bool], whole_of: Callable[..., Tensor], low_of: Callable[..., Tensor], inputs: tuple[Tensor, ...],
        expert_S: Tensor, counts_E: Tensor,
    ) -> Tensor:  # fmt: skip
        """Rows of experts with low-rank matrices through one function, the others through the other one."""
        if all(low) or not any(low):
            return (low_of if low[0] else whole_of)(_offsets(counts_E), *inputs)
        low_E = torch.tensor(low, device=expert_S.device)
        rows_S = low_E[expert_S]
        y_whole = whole_of(_offsets(counts_E[~low_E]), *(x_SN[~rows_S] for x_SN in inputs))
        y_low = low_of(_offsets(counts_E[low_E]), *(x_SN[rows_S] for x_SN in inputs))
        y_SM = y_low.new_empty(len(rows_S), y_low.shape[1])
        y_SM[rows_S], y_SM[~rows_S] = y_low, y_whole
        return y_SM

    def _gate_up(self, offsets_E: Tensor, *inputs: Tensor) -> Tensor:
        gate_SF, up_SF = _both(inputs, self.gate_up_proj, offsets_E)
        return self.act_fn(gate_SF) * up_SF

    def _gate_up_low(self, offsets_E: Tensor, *inputs: Tensor) -> Tensor:
        gate_SR, up_SR = _both(inputs, self.gate_up_in, offsets_E)
        gate_EFR, up_EFR = self.gate_up_out.chunk(2, dim=1)
        return self.act_fn(grouped_linear(gate_SR, gate_EFR, offsets_E)) * grouped_linear(up_SR, up_EFR, offsets_E)

    def _down(self, offsets_E: Tensor, x_SF: Tensor) -> Tensor:
        return grouped_linear(x_SF, self.down_proj, offsets_E)

    def _down_low(self, offsets_E: Tensor, x_SF: Tensor) -> Tensor:
        return grouped_linear(grouped_linear(x_SF, self.down_in, offsets_E), self.down_out, offsets_E)


def experts_of(standard: Any, format: Format, config: Config) -> Any:
    """A family's fused experts, or what stands in their place where a layer of this format needs it."""
    if not format.own:
        return standard
    arch, width, inner = arch_of(config), standard.hidden_dim, standard.intermediate_dim
    compressed = skip = None
    if format.compressed:
        ordered = arch.score == "sparsemixer"  # its weights come from rounds of their own, and say nothing of each other
        main = arch.computed(config)
        compressed = CompressedExperts(format.compressed, format.experts, width, inner, main=main, ordered=ordered)
    if format.skip:
        skip = Skip(format.skip, renormalize=arch.normalizes(config))
    return RoutedExperts(format, width, inner, standard.act_fn, skip=skip, compressed=compressed)


def _both(inputs: tuple[Tensor, ...], weight_EMN: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up: in one product where their input is the same, and otherwise each by itself."""
    if len(inputs) == 1:
        both_SM = grouped_linear(inputs[0], weight_EMN, offsets_E)
    else:
        # side by side in one tensor, too: how an activation rounds its last bits depends on how its input lies in memory
        weights = weight_EMN.chunk(2, dim=1)
        both_SM = torch.cat([grouped_linear(x, w, offsets_E) for x, w in zip(inputs, weights, strict=True)], dim=-1)
    gate_SM, up_SM = both_SM.chunk(2, dim=-1)
    return gate_SM, up_SM


def grouped_linear(x_SN: Tensor, weight_EMN: Tensor, offsets_E: Tensor) -> Tensor:
    """Rows sorted by expert, each times the matrix of its own: [S, M]; expert e's rows end before `offsets_E[e]`."""
    x_SN = x_SN.to(weight_EMN.dtype)
    if _in_one_kernel(x_SN):
        return grouped_mm(x_SN, weight_EMN.transpose(-2, -1), offs=offsets_E)
    y, start = [], 0
    for weight_MN, stop in zip(weight_EMN.unbind(), offsets_E.tolist(), strict=True):
        # an expert without rows is left out only where no gradient is wanted: with one, its own is zero and not absent
        if stop > start or torch.is_grad_enabled():
            y.append(_product(x_SN[start:stop], weight_MN))
        start = stop
    return torch.cat(y) if y else x_SN.new_empty(0, weight_EMN.shape[1])


def _in_one_kernel(x_SN: Tensor) -> bool:
    return x_SN.is_cuda and torch.cuda.get_device_capability(x_SN.device) >= (8, 0)


def _product(x_SN: Tensor, weight_MN: Tensor) -> Tensor:
    if x_SN.dtype is torch.bfloat16 and len(x_SN) >= UPCAST_ROWS and not x_SN.is_cuda and _NO_BF16:
        return linear(x_SN.float(), weight_MN.float()).bfloat16()
    return linear(x_SN, weight_MN)


_NO_BF16 = torch.backends.cpu.get_cpu_capability() == "AVX2"


def _offsets(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0, dtype=torch.int32)
