"""Fused experts that the family's own module cannot compute: with low-rank matrices, skipping, or Compressed Experts.

Shapes are suffixes: T tokens, S routed (token, expert) pairs sorted by expert, E experts, M rows, N columns, R rank, D model
width, F expert width, k experts a token.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear

from moeflow.arch import Config, Family
from moeflow.model import ragged
from moeflow.model.buckets import Buckets
from moeflow.model.checkpoint import activation
from moeflow.model.factors import PLAIN, Form, form_of, sizes_of, stacks
from moeflow.model.fewer_active import CompressedExperts, Scales, Skip
from moeflow.model.formats import Format
from moeflow.model.moe import MLP, Activation, Clamped, LowRank

Product = Callable[[Tensor, Tensor], Tensor]
"""Multiplies rows [S, N] with a matrix [M, N], or each row with its expert's matrix in a stack [E, M, N]."""

Factors = tuple[Tensor, tuple[Tensor, ...] | None]
"""Whole matrices, or the first factors and the second ones of each matrix."""


class _Lie(NamedTuple):
    """Where the matrices of one kind lie: those of experts that have them whole, and both factors of the others."""

    whole: ragged.Matrices | None
    first: ragged.Matrices | None
    second: ragged.Matrices | None


UPCAST_ROWS = 4
"""Products in bf16 with at least this many rows run in fp32 on a processor without bf16 instructions: 3 to 6 times faster."""


class RoutedExperts(nn.Module):
    """A layer's routed experts, called like transformers' own: (x [T, D], index [T, k], weights [T, k]) to [T, D]. Where a family
    weighs inputs, it is called with those of every expert, one expert after the other: x [E T, D] to [E T, D].

    Its parameters are stacks (`factors.Stack`): `gate_up_proj` and `down_proj` [E, M, N] of the experts with whole matrices,
    `gate_up_in`, `gate_up_out`, `down_in` and `down_out` [R, N] of the others, padded with zeros to the ranks of their bucket
    (`Buckets`); `up` in place of `gate_up` where experts have no gate. The padding takes part in the products but adds nothing; its
    gradient is zero, because the other factor is zero there. Biases are stacks [E, M]. The parameters start as zeros and are filled
    by a loader. `skip` and `compressed` decide which of a token's experts are computed; the others cost nothing. If `recorder` is
    set, it is shown the output of each routed pair. With a `share` it has only these of the layer's experts, and its result is the
    part of the sum that they give.
    """

    act_fn: Callable[..., Tensor]

    def __init__(
        self, format: Format, width: int, inner: int, act: Callable[..., Tensor],
        *, form: Form = PLAIN, skip: Skip | None = None, compressed: CompressedExperts | None = None, share: range | None = None,
    ) -> None:  # fmt: skip
        """`act` is the activation of the gate, or of up if there is no gate; a `Clamped` takes both. `format` is that of its own
        experts, `share` their numbers among all of the layer's."""
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim, self.act_fn = format.experts, width, inner, act
        self.form, self.first = form, "gate_up" if form.gated else "up"
        self.first_low = [rank > 0 for rank in format.ranks("up")]
        self.down_low = [rank > 0 for rank in format.ranks("down")]
        both = {self.first: self.first_low, "down": self.down_low}
        self.number = {stem: [low[:e].count(low[e]) for e in range(len(low))] for stem, low in both.items()}  # among its kind
        self.recorder: Any = None
        self.buckets: dict[str, Buckets] = {}
        for stack in stacks(format, form):
            if stack.factors:
                self.buckets[stack.name.rpartition("_")[0]] = stack.buckets(format)
            self.register_parameter(stack.name, nn.Parameter(torch.zeros(stack.shape(format, width, inner))))
        self.skip, self.compressed, self.share = skip, compressed, share
        self.apart = not alike(format, form)
        self._matrices: dict[str, list[_Lie]] = {}

    def forward(self, x_TD: Tensor, index_Tk: Tensor | None = None, weights_Tk: Tensor | None = None) -> Tensor:
        if index_Tk is None or weights_Tk is None:
            return self._each_its_own(x_TD)
        scales = None
        if self.compressed is not None:
            weights_Tk, index_Tk, scales = self.compressed(weights_Tk, index_Tk)
        if self.skip is not None:  # the index of a skipped one is below those of all experts, so in no share
            weights_Tk, index_Tk = self.skip(weights_Tk, index_Tk, -1 if self.share else self.num_experts)
        if self.share:
            index_Tk = index_Tk - self.share.start
            index_Tk = torch.where((index_Tk < 0) | (index_Tk >= self.num_experts), self.num_experts, index_Tk)
        tokens, k = index_Tk.shape
        expert_S, order_S = index_Tk.reshape(-1).sort()
        # counting by comparison does not wait for the GPU, and works with deterministic algorithms
        counts_E = (expert_S == torch.arange(self.num_experts, device=expert_S.device)[:, None]).sum(1)
        if self.skip is not None or self.share:  # skipped pairs, and those of other shares, are at the end, and are cut off
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
        count = self.form.firsts
        gate_and_up, last_one = self._parts(self.first, self.first_low), self._parts("down", self.down_low)
        for e in range(self.num_experts):
            (first, first_outs), (down, down_outs) = gate_and_up(e), last_one(e)
            parts = first.split(self._sizes(first, first_outs), dim=-2)
            pairs = zip((*parts, down), (*(first_outs or (None,) * count), *(down_outs or (None,))), strict=True)
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
        work = self._one_by_one
        if in_one_kernel(x_TD):
            if self.apart and ragged.AVAILABLE and not torch.is_grad_enabled():
                work = self._at_once
            elif all(lie.aligned for lie in self.buckets.values()):
                work = self._together
        return work(x_TD, token_S, scales, expert_S, counts_E)

    def _one_by_one(self, x_TD: Tensor, token_S: Tensor, scales: Scales | None, expert_S: Tensor, counts_E: Tensor) -> Tensor:
        """The outputs [S, D], one expert after the other, which keeps the processor's cache warm."""
        y, start = [], 0
        first, down = self._parts(self.first, self.first_low), self._parts("down", self.down_low)
        for e, stop in enumerate(counts_E.cumsum(0).tolist()):
            # an expert without rows takes part if gradients are computed, so that its gradient is zero and not absent
            if stop > start or torch.is_grad_enabled():
                token_s = token_S[start:stop]
                bias, down_bias = self._bias(self.first, e), self._bias("down", e)
                inner_sF = self._inner(_product, *first(e), _inputs(x_TD, token_s, scales), bias)
                y.append(_added(_outer(_product, *down(e), _scaled(inner_sF, token_s, scales)), down_bias))
            start = stop
        return torch.cat(y) if y else x_TD.new_empty(0, self.hidden_dim)

    def _together(self, x_TD: Tensor, token_S: Tensor, scales: Scales | None, expert_S: Tensor, counts_E: Tensor) -> Tensor:
        """The outputs [S, D], with one kernel for each product of all experts of a bucket."""

        def first(factors: Factors, offsets_E: Tensor, expert_S: Tensor, *inputs_SD: Tensor) -> Tensor:
            return self._inner(partial(_grouped, offsets_E), *factors, inputs_SD, self._bias(self.first, expert_S))

        def down(factors: Factors, offsets_E: Tensor, expert_S: Tensor, x_SF: Tensor) -> Tensor:
            return _added(_outer(partial(_grouped, offsets_E), *factors, x_SF), self._bias("down", expert_S))

        def each(stem: str, work: Callable[..., Tensor], low: bool, counts_E: Tensor, expert_S: Tensor, *inputs: Tensor) -> Tensor:
            if not low:
                return work((getattr(self, f"{stem}_proj"), None), _offsets(counts_E), expert_S, *inputs)
            lie = self.buckets[stem]
            factors = zip(lie.first(getattr(self, f"{stem}_in")), lie.second(getattr(self, f"{stem}_out")), strict=True)
            return _by_bucket(lie, work, list(factors), counts_E, expert_S, *inputs)

        inner_SF = _either(self.first_low, partial(each, self.first, first), _inputs(x_TD, token_S, scales), expert_S, counts_E)
        return _either(self.down_low, partial(each, "down", down), (_scaled(inner_SF, token_S, scales),), expert_S, counts_E)

    def _at_once(self, x_TD: Tensor, token_S: Tensor, scales: Scales | None, expert_S: Tensor, counts_E: Tensor) -> Tensor:
        """The outputs [S, D], with one kernel for each product of all experts, whole ones and those of any rank."""
        ends_E, inputs = _offsets(counts_E), _inputs(x_TD, token_S, scales)
        bias = self._bias(self.first, expert_S)
        biases = (None,) * self.form.firsts if bias is None else bias.chunk(self.form.firsts, dim=-1)
        parts = [
            _added(self._product_at_once(self.first, at, inputs[min(at, len(inputs) - 1)], ends_E), biases[at])
            for at in range(self.form.firsts)
        ]
        inner_SF = _scaled(self._activated(parts), token_S, scales)
        return _added(self._product_at_once("down", 0, inner_SF, ends_E), self._bias("down", expert_S))

    def _product_at_once(self, stem: str, at: int, x_SN: Tensor, ends_E: Tensor) -> Tensor:
        """The product with matrix number `at` of each row's expert, [S, M]."""
        if stem not in self._matrices:
            self._matrices[stem] = self._lies(stem)
        lie, y_SM = self._matrices[stem][at], None
        if lie.whole is not None:
            y_SM = ragged.times(x_SN, getattr(self, f"{stem}_proj"), lie.whole, ends_E)
        if lie.first is not None and lie.second is not None:
            inner_SR = ragged.times(x_SN, getattr(self, f"{stem}_in"), lie.first, ends_E)
            y_SM = ragged.times(inner_SR, getattr(self, f"{stem}_out"), lie.second, ends_E, y_SM)
        assert y_SM is not None
        return y_SM

    def _lies(self, stem: str) -> list["_Lie"]:
        """Where each expert's matrices of a kind lie in the parameters."""
        low, made = (self.first_low if stem == self.first else self.down_low), []
        sides = (self.intermediate_dim, self.hidden_dim)
        m, n = sides if stem == self.first else sides[::-1]
        count = self.form.firsts if stem == self.first else 1
        for at in range(count):
            whole, first, second = ([ragged.Matrix()] * self.num_experts for _ in range(3))
            for e, number in enumerate(self.number[stem]):
                if not low[e]:
                    whole[e] = ragged.Matrix((number * count + at) * m * n, m, n)
                    continue
                rows, each = self.buckets[stem].spans[number]
                ranks = [span.stop - span.start for span in each]
                first[e] = ragged.Matrix((rows.start + sum(ranks[:at])) * n, ranks[at], n)
                second[e] = ragged.Matrix(each[at].start * m, m, ranks[at])
            made.append(_Lie(*(ragged.Matrices(of) if any(one.rows for one in of) else None for of in (whole, first, second))))
        return made

    def _parts(self, stem: str, low: list[bool]) -> Callable[[int], Factors]:
        """The function that gives an expert's gate and up matrices, or its down matrix."""
        # with gradients, split all at once, so that there is one backward pass of it; without, only what is asked for
        learns, lie = torch.is_grad_enabled(), self.buckets.get(stem)
        # by attribute, because LoRA may replace the parameter by a sum
        whole, inner, outer = (cast(Any, getattr(self, f"{stem}_{part}", None)) for part in ("proj", "in", "out"))
        if learns:
            whole = None if whole is None else whole.unbind()
            firsts, seconds = ([], []) if lie is None else (lie.first_of(inner), lie.second_of(outer))

        def of(e: int) -> Factors:
            at = self.number[stem][e]
            if not low[e]:
                return whole[at], None
            if learns:
                return firsts[at], tuple(t.view(t.shape[1], t.shape[0]) for t in seconds[at])
            assert lie is not None
            rows, each = lie.spans[at]
            return inner[rows], tuple(outer[now].view(outer.shape[1], -1) for now in each)

        return of

    def _sizes(self, first: Tensor, seconds: tuple[Tensor, ...] | None) -> list[int]:
        """How many rows of the first factors, or of the matrices, are gate's and up's."""
        count = self.form.firsts
        return [first.shape[-2] // count] * count if seconds is None else [second.shape[-1] for second in seconds]

    def _bias(self, stem: str, experts: int | Tensor) -> Tensor | None:
        """The bias of one expert, or for each row that of its own."""
        return getattr(self, f"{stem}_proj_bias")[experts] if self.form.biased else None

    def _inner(
        self, product: Product, first: Tensor, seconds: tuple[Tensor, ...] | None, inputs: tuple[Tensor, ...], bias: Tensor | None
    ) -> Tensor:
        """The input of down, [S, F]; `inputs` are those of gate and of up, or one tensor for both."""
        sizes = self._sizes(first, seconds)
        if len(inputs) == 1 or not self.form.gated:
            both = product(inputs[-1], first)
        else:
            # in one tensor, too, because how an activation rounds its last bits depends on its input's layout in memory
            both = torch.cat([product(x, w) for x, w in zip(inputs, first.split(sizes, dim=-2), strict=True)], dim=-1)
        if seconds is None:
            parts = list(_added(both, bias).split(sizes, dim=-1))
        else:
            biases = (None,) * len(sizes) if bias is None else bias.chunk(len(sizes), dim=-1)
            factors = zip(both.split(sizes, dim=-1), seconds, biases, strict=True)
            parts = [_added(product(x, w), b) for x, w, b in factors]
        return self._activated(parts)

    def _activated(self, parts: list[Tensor]) -> Tensor:
        """The input of down, of the outputs of gate and up, or of up alone."""
        if not self.form.gated:
            inner: Tensor = self.act_fn(parts[0])
            return inner
        gate, up = parts
        return self.act_fn(gate, up) if isinstance(self.act_fn, Clamped) else self.act_fn(gate) * up


def experts_of(standard: Any, format: Format, config: Config, share: range | None = None) -> Any:
    """The family's fused experts, or `RoutedExperts` if the layer's format needs them, or if it is to have only a share of them."""
    if not format.own and share is None:
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
    here = format if share is None else format.part(share)
    return RoutedExperts(here, width, inner, act_fn, form=own, skip=skip, compressed=compressed, share=share)


def waits(format: Format, form: Form = PLAIN) -> bool:
    """Whether the forward of `RoutedExperts` of this format may wait for the GPU to say how many rows there are, so that no CUDA
    graph can be counted on: where tokens skip experts, or experts are not `alike`. With Triton the latter do not wait, and a graph
    held them; no engine's graphs were tried with that."""
    return bool(format.skip) or not alike(format, form)


def alike(format: Format, form: Form = PLAIN) -> bool:
    """Whether all experts of this format are whole, or all of ranks so near each other that they are padded to one."""
    lie = [stack.buckets(format) for stack in stacks(format, form) if stack.factors]
    mixed = any(len({rank > 0 for rank in format.ranks(matrix)}) > 1 for matrix in ("up", "down"))
    return not mixed and all(len(one.every) == 1 and one.aligned for one in lie)


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


def _outer(product: Product, first: Tensor, seconds: tuple[Tensor, ...] | None, x_SF: Tensor) -> Tensor:
    y = product(x_SF, first)
    return y if seconds is None else product(y, *seconds)


def _added(y_SM: Tensor, bias: Tensor | None) -> Tensor:
    return y_SM if bias is None else y_SM + bias


def _either(low: list[bool], work: Callable[..., Tensor], inputs: tuple[Tensor, ...], expert_S: Tensor, counts_E: Tensor) -> Tensor:
    """Compute the rows of experts with low-rank matrices and the rows of the others separately."""
    if all(low) or not any(low):
        return work(low[0], counts_E, expert_S, *inputs)
    low_E = torch.tensor(low, device=expert_S.device)
    rows_S = low_E[expert_S]
    y_whole = work(False, counts_E[~low_E], expert_S[~rows_S], *(x_SN[~rows_S] for x_SN in inputs))
    y_low = work(True, counts_E[low_E], expert_S[rows_S], *(x_SN[rows_S] for x_SN in inputs))
    y_SM = y_low.new_empty(len(rows_S), y_low.shape[1])
    y_SM[rows_S], y_SM[~rows_S] = y_low, y_whole
    return y_SM


def _by_bucket(
    lie: Buckets, work: Callable[..., Tensor], factors: list[Factors], counts_E: Tensor, expert_S: Tensor, *inputs: Tensor
) -> Tensor:
    """Compute the rows of each bucket's experts together, and put them in the experts' order again."""
    if len(lie.every) == 1:
        return work(factors[0], _offsets(counts_E), expert_S, *inputs)
    order = torch.tensor([e for bucket in lie.every for e in bucket.experts], device=counts_E.device)
    place_E = torch.empty_like(order)
    place_E[order] = torch.arange(len(order), device=order.device)
    begin_E = counts_E.cumsum(0) - counts_E
    # each row's place in the order of buckets: where its expert's begin there, and its number among them
    moved_E = counts_E[order].cumsum(0) - counts_E[order]
    shift_E = moved_E[place_E] - begin_E
    row_S = torch.arange(len(expert_S), device=order.device) + shift_E.repeat_interleave(counts_E, output_size=len(expert_S))
    back_S = torch.empty_like(row_S)
    back_S[row_S] = torch.arange(len(row_S), device=order.device)
    counts = counts_E[order].split([len(bucket.experts) for bucket in lie.every])
    rows = torch.stack([of_bucket.sum() for of_bucket in counts]).tolist()
    made = [
        work(factor, _offsets(of_bucket), expert_S[now], *(x_SN[now] for x_SN in inputs))
        for factor, of_bucket, now in zip(factors, counts, back_S.split(rows), strict=True)
    ]
    return torch.cat(made)[row_S]


def _grouped(offsets_E: Tensor, x_SN: Tensor, weight_EMN: Tensor) -> Tensor:
    """Rows sorted by expert, each times its expert's matrix: [S, M]. The rows of expert e end before `offsets_E[e]`."""
    if not len(x_SN):  # no work for a kernel, but the gradient is zero and not absent
        return x_SN @ weight_EMN[0].mT
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
