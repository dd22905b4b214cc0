"""Fused experts that the family's own module cannot compute: with low-rank matrices, skipping, or Compressed Experts.

Shapes are suffixes: T tokens, S routed (token, expert) pairs sorted by expert, E experts, M rows, N columns, R rank, D model
width, F expert width, k experts a token.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear

from moeflow.arch import Config, Family
from moeflow.model.checkpoint import activation
from moeflow.model.factors import PLAIN, Form, form_of, sizes_of, stacks
from moeflow.model.fewer_active import CompressedExperts, Scales, Skip
from moeflow.model.formats import Format
from moeflow.model.moe import MLP, Activation, Clamped, LowRank

Product = Callable[[Tensor, Tensor], Tensor]
"""Multiplies rows [S, N] with a matrix [M, N], or each row with its expert's matrix in a stack [E, M, N]."""

UPCAST_ROWS = 4
"""Products in bf16 with at least this many rows run in fp32 on a processor without bf16 instructions: 3 to 6 times faster."""


class RoutedExperts(nn.Module):
    """A layer's routed experts, called like transformers' own: (x [T, D], index [T, k], weights [T, k]) to [T, D]. Where a family
    weighs inputs, it is called with those of every expert, one expert after the other: x [E T, D] to [E T, D].

    Its parameters are stacks [E, M, N] (`factors.Stack`): `gate_up_proj` and `down_proj` of the experts with whole matrices,
    `gate_up_in`, `gate_up_out`, `down_in` and `down_out` of the others, padded with zeros to the same rank; `up` in place of
    `gate_up` where experts have no gate. The padding takes part in the products but adds nothing; its gradient is zero, because
    the other factor is zero there. Biases are stacks [E, M]. The parameters start as zeros and are filled by a loader. `skip` and
    `compressed` decide which of a token's experts are computed; the others cost nothing. If `recorder` is set, it is shown the
    output of each routed pair.
    """

    act_fn: Callable[..., Tensor]

    def __init__(
        self, format: Format, width: int, inner: int, act: Callable[..., Tensor],
        *, form: Form = PLAIN, skip: Skip | None = None, compressed: CompressedExperts | None = None,
    ) -> None:  # fmt: skip
        """`act` is the activation of the gate, or of up if there is no gate; a `Clamped` takes both."""
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim, self.act_fn = format.experts, width, inner, act
        self.form, self.first = form, "gate_up" if form.gated else "up"
        self.first_low = [rank > 0 for rank in format.ranks("up")]
        self.down_low = [rank > 0 for rank in format.ranks("down")]
        self.recorder: Any = None
        for stack in stacks(format, form):
            self.register_parameter(stack.name, nn.Parameter(torch.zeros(stack.shape(format, width, inner))))
        self.skip, self.compressed = skip, compressed

    def forward(self, x_TD: Tensor, index_Tk: Tensor | None = None, weights_Tk: Tensor | None = None) -> Tensor:
        if index_Tk is None or weights_Tk is None:
            return self._each_its_own(x_TD)
        scales = None
        if self.compressed is not None:
            weights_Tk, index_Tk, scales = self.compressed(weights_Tk, index_Tk)
        if self.skip is not None:
            weights_Tk, index_Tk = self.skip(weights_Tk, index_Tk, self.num_experts)
        tokens, k = index_Tk.shape
        expert_S, order_S = index_Tk.reshape(-1).sort()
        # counting by comparison does not wait for the GPU, and works with deterministic algorithms
        counts_E = (expert_S == torch.arange(self.num_experts, device=expert_S.device)[:, None]).sum(1)
        if self.skip is not None:  # skipped pairs are at the end, and are cut off
            computed = int(counts_E.sum())
            expert_S, order_S = expert_S[:computed], order_S[:computed]
        y_SD = self._outputs(x_TD, order_S // k, scales, expert_S, counts_E)
        if len(order_S) < tokens * k:
            y_TkD = y_SD.new_zeros(tokens * k, y_SD.shape[1]).index_copy(0, order_S, y_SD).view(tokens, k, -1)
        else:
            back_S = torch.empty_like(order_S)
            back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
            y_TkD = y_SD[back_S].view(tokens, k, -1)
        if self.recorder is not None:
            self.recorder.pairs(y_TkD, index_Tk, weights_Tk)
        return (y_TkD * weights_Tk.unsqueeze(-1)).sum(dim=1).to(x_TD.dtype)

    def mlps(self, act: Activation) -> Iterator[MLP]:
        """The experts one after the other; they share this module's memory."""
        for e, (first, first_out, down, down_out) in enumerate(self._matrices()):
            count = 2 if self.form.gated else 1
            parts = first.chunk(count, dim=-2)
            outs = (None,) * count if first_out is None else first_out.chunk(count, dim=-2)
            pairs = zip((*parts, down), (*outs, down_out), strict=True)
            *gate, up, last = (inner if out is None else LowRank(out, inner) for inner, out in pairs)
            biases: tuple[Tensor, ...] = ()
            if self.form.biased:
                first_bias, down_bias = (getattr(self, f"{stem}_proj_bias")[e] for stem in (self.first, "down"))
                biases = (*first_bias.chunk(count), down_bias)
            yield MLP(gate[0] if gate else None, up, last, act, biases)

    def _each_its_own(self, x_SD: Tensor) -> Tensor:
        """Rows that lie in as many equal parts as there are experts, each part through its expert, [S, D]."""
        each = len(x_SD) // self.num_experts
        counts_E = torch.full((self.num_experts,), each, device=x_SD.device)
        expert_S = torch.arange(self.num_experts, device=x_SD.device).repeat_interleave(each)
        return self._outputs(x_SD, torch.arange(len(x_SD), device=x_SD.device), None, expert_S, counts_E).to(x_SD.dtype)

    def _outputs(self, x_TD: Tensor, token_S: Tensor, scales: Scales | None, expert_S: Tensor, counts_E: Tensor) -> Tensor:
        x_TD = x_TD.to(next(p.dtype for p in self.parameters(recurse=False)))
        work = self._together if in_one_kernel(x_TD) else self._one_by_one
        return work(x_TD, token_S, scales, expert_S, counts_E)

    def _one_by_one(self, x_TD: Tensor, token_S: Tensor, scales: Scales | None, expert_S: Tensor, counts_E: Tensor) -> Tensor:
        """The outputs [S, D], one expert after the other, which keeps the processor's cache warm."""
        y, start = [], 0
        for e, (matrices, stop) in enumerate(zip(self._matrices(), counts_E.cumsum(0).tolist(), strict=True)):
            # an expert without rows takes part if gradients are computed, so that its gradient is zero and not absent
            if stop > start or torch.is_grad_enabled():
                token_s = token_S[start:stop]
                bias, down_bias = self._bias(self.first, e), self._bias("down", e)
                inner_sF = self._inner(_product, *matrices[:2], _inputs(x_TD, token_s, scales), bias)
                y.append(_added(_outer(_product, *matrices[2:], _scaled(inner_sF, token_s, scales)), down_bias))
            start = stop
        return torch.cat(y) if y else x_TD.new_empty(0, self.hidden_dim)

    def _together(self, x_TD: Tensor, token_S: Tensor, scales: Scales | None, expert_S: Tensor, counts_E: Tensor) -> Tensor:
        """The outputs [S, D], with one kernel for each product of all experts."""

        def first(low: bool, offsets_E: Tensor, expert_S: Tensor, *inputs_SD: Tensor) -> Tensor:
            bias = self._bias(self.first, expert_S)
            return self._inner(partial(_grouped, offsets_E), *self._factors(self.first, low), inputs_SD, bias)

        def down(low: bool, offsets_E: Tensor, expert_S: Tensor, x_SF: Tensor) -> Tensor:
            return _added(_outer(partial(_grouped, offsets_E), *self._factors("down", low), x_SF), self._bias("down", expert_S))

        inner_SF = _either(self.first_low, first, _inputs(x_TD, token_S, scales), expert_S, counts_E)
        return _either(self.down_low, down, (_scaled(inner_SF, token_S, scales),), expert_S, counts_E)

    def _matrices(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor | None]]:
        """The matrices of each expert: gate and up, their second factor, down, its second factor."""
        # by attribute, because LoRA may replace the parameter by a sum
        stacked = {name: iter(getattr(self, name).unbind()) for name, _ in self.named_parameters(recurse=False)}

        def factors(stem: str, low: bool) -> tuple[Tensor, Tensor | None]:
            return (next(stacked[f"{stem}_in"]), next(stacked[f"{stem}_out"])) if low else (next(stacked[f"{stem}_proj"]), None)

        for first_low, down_low in zip(self.first_low, self.down_low, strict=True):
            yield *factors(self.first, first_low), *factors("down", down_low)

    def _factors(self, stem: str, low: bool) -> tuple[Tensor, Tensor | None]:
        """The stack of the whole matrices, or the two stacks of the factors of the others."""
        return (getattr(self, f"{stem}_in"), getattr(self, f"{stem}_out")) if low else (getattr(self, f"{stem}_proj"), None)

    def _bias(self, stem: str, experts: int | Tensor) -> Tensor | None:
        """The bias of one expert, or for each row that of its own."""
        return getattr(self, f"{stem}_proj_bias")[experts] if self.form.biased else None

    def _inner(
        self, product: Product, first: Tensor, second: Tensor | None, inputs: tuple[Tensor, ...], bias: Tensor | None
    ) -> Tensor:
        """The input of down, [S, F]; `inputs` are those of gate and of up, or one tensor for both."""
        if not self.form.gated:
            (x_SD,) = inputs[-1:]
            inner: Tensor = self.act_fn(_added(_outer(product, first, second, x_SD), bias))
            return inner
        if len(inputs) == 1:
            both = product(inputs[0], first)
        else:
            # in one tensor, too, because how an activation rounds its last bits depends on its input's layout in memory
            both = torch.cat([product(x, w) for x, w in zip(inputs, first.chunk(2, dim=-2), strict=True)], dim=-1)
        both = both if second is not None else _added(both, bias)
        gate, up = both.chunk(2, dim=-1)
        if second is not None:
            parts = (None, None) if bias is None else bias.chunk(2, dim=-1)
            factors = zip((gate, up), second.chunk(2, dim=-2), parts, strict=True)
            gate, up = (_added(product(x, w), b) for x, w, b in factors)
        return self.act_fn(gate, up) if isinstance(self.act_fn, Clamped) else self.act_fn(gate) * up


def experts_of(standard: Any, format: Format, config: Config) -> Any:
    """The family's fused experts, or `RoutedExperts` if the layer's format needs them."""
    if not format.own:
        return standard
    form = form_of(standard)
    family, (width, inner) = Family.of(config), sizes_of(standard, form)
    if format.compressed or format.skip:
        family.check_weighs_outputs("skipped or Compressed Experts")
    compressed = skip = None
    if format.compressed:
        ordered = family.arch.score == "sparsemixer"  # each weight comes from a softmax of its own, so they cannot be compared
        main = family.main_experts
        compressed = CompressedExperts(format.compressed, format.experts, width, inner, main=main, ordered=ordered)
    if format.skip:
        skip = Skip(format.skip, renormalize=family.normalizes)
    act = activation(config)
    own = Form(gated=form.gated, biased=form.biased)
    act_fn = act if isinstance(act, Clamped) else standard.act_fn
    return RoutedExperts(format, width, inner, act_fn, form=own, skip=skip, compressed=compressed)


def _inputs(x_TD: Tensor, token_S: Tensor, scales: Scales | None) -> tuple[Tensor, ...]:
    """The inputs of gate and up, or one tensor for both."""
    x_SD = x_TD[token_S]
    if scales is None:
        return (x_SD,)
    gate_SD = (x_SD * scales.gate[token_S]).to(x_SD.dtype)
    return (gate_SD,) if scales.up is scales.gate else (gate_SD, (x_SD * scales.up[token_S]).to(x_SD.dtype))


def _scaled(inner_SF: Tensor, token_S: Tensor, scales: Scales | None) -> Tensor:
    """The input of down, scaled if it has a vector."""
    if scales is None or scales.inner is None:
        return inner_SF
    return (inner_SF * scales.inner[token_S]).to(inner_SF.dtype)


def _outer(product: Product, first: Tensor, second: Tensor | None, x_SF: Tensor) -> Tensor:
    y = product(x_SF, first)
    return y if second is None else product(y, second)


def _added(y_SM: Tensor, bias: Tensor | None) -> Tensor:
    return y_SM if bias is None else y_SM + bias


def _either(low: list[bool], work: Callable[..., Tensor], inputs: tuple[Tensor, ...], expert_S: Tensor, counts_E: Tensor) -> Tensor:
    """Compute the rows of experts with low-rank matrices and the rows of the others separately."""
    if all(low) or not any(low):
        return work(low[0], _offsets(counts_E), expert_S, *inputs)
    low_E = torch.tensor(low, device=expert_S.device)
    rows_S = low_E[expert_S]
    y_whole = work(False, _offsets(counts_E[~low_E]), expert_S[~rows_S], *(x_SN[~rows_S] for x_SN in inputs))
    y_low = work(True, _offsets(counts_E[low_E]), expert_S[rows_S], *(x_SN[rows_S] for x_SN in inputs))
    y_SM = y_low.new_empty(len(rows_S), y_low.shape[1])
    y_SM[rows_S], y_SM[~rows_S] = y_low, y_whole
    return y_SM


def _grouped(offsets_E: Tensor, x_SN: Tensor, weight_EMN: Tensor) -> Tensor:
    """Rows sorted by expert, each times its expert's matrix: [S, M]. The rows of expert e end before `offsets_E[e]`."""
    return grouped_mm(x_SN, weight_EMN.transpose(-2, -1), offs=offsets_E)


def in_one_kernel(x_SN: Tensor) -> bool:
    """Whether one kernel can compute all experts' products; it knows no fp64."""
    return x_SN.is_cuda and x_SN.itemsize <= 4 and torch.cuda.get_device_capability(x_SN.device) >= (8, 0)


def _product(x_SN: Tensor, weight_MN: Tensor) -> Tensor:
    """Rows times one matrix, [S, M]."""
    if x_SN.dtype is torch.bfloat16 and len(x_SN) >= UPCAST_ROWS and not x_SN.is_cuda and _NO_BF16:
        return linear(x_SN.float(), weight_MN.float()).bfloat16()
    return linear(x_SN, weight_MN)


_NO_BF16 = torch.backends.cpu.get_cpu_capability() == "AVX2"


def _offsets(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0, dtype=torch.int32)
