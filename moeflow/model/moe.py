"""One MoE layer of any family as plain tensors, and the arithmetic that all methods share.

Shapes are suffixes: T tokens, D model width, F expert width, E experts, k experts a token, M outputs and N inputs of a matrix, R
rank. This file knows neither files nor transformers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from moeflow.model.router import Router, dense

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_pytorch_tanh": partial(gelu, approximate="tanh"),
    "relu": relu,
    "relu2": lambda x: relu(x).square(),
}

CLAMPED = "clamped_swiglu"
"""The name of `Clamped`, which is no function of the gate alone, among activations."""


@dataclass(frozen=True)
class Clamped:
    """The activation of gpt-oss: gate and up are clamped, and one is added to up (arXiv 2508.10925, 2.2)."""

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        gate_TF = gate_TF.clamp(max=self.limit)
        return (up_TF.clamp(-self.limit, self.limit) + 1) * (gate_TF * torch.sigmoid(gate_TF * self.alpha))


Activation = str | Clamped
"""A row of `ACTIVATIONS`, or `Clamped`."""


def activate(act: Activation, gate_TF: Tensor | None, up_TF: Tensor) -> Tensor:
    """The input of an expert's down matrix, from the outputs of its gate, if it has one, and up matrices."""
    if isinstance(act, Clamped):
        assert gate_TF is not None
        return act(gate_TF, up_TF)
    return ACTIVATIONS[act](up_TF) if gate_TF is None else ACTIVATIONS[act](gate_TF) * up_TF


@dataclass(frozen=True)
class LowRank:
    """A matrix [M, N] as the product of two factors."""

    out_MR: Tensor
    in_RN: Tensor

    def to(self, **where: Any) -> "LowRank":
        return LowRank(self.out_MR.to(**where), self.in_RN.to(**where))

    def whole(self) -> Tensor:
        """The product [M, N], multiplied in fp32."""
        return (self.out_MR.float() @ self.in_RN.float()).to(self.in_RN.dtype)


Matrix = Tensor | LowRank


def apply(matrix: Matrix, x_TN: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """Rows [T, N] times a matrix [M, N], transposed, plus a bias: [T, M]."""
    if isinstance(matrix, LowRank):
        return linear(linear(x_TN, matrix.in_RN), matrix.out_MR, bias_M)
    return linear(x_TN, matrix, bias_M)


def whole(matrix: Matrix) -> Tensor:
    """The matrix as one tensor, multiplied out if it is low-rank."""
    return matrix.whole() if isinstance(matrix, LowRank) else matrix


@dataclass(frozen=True)
class MLP:
    """A feed-forward network, gated or not: one routed expert, or the shared one. `biases` are those of its matrices, or none."""

    gate_FD: Matrix | None
    up_FD: Matrix
    down_DF: Matrix
    act: Activation = "silu"
    biases: tuple[Tensor, ...] = ()

    def __call__(self, x_TD: Tensor) -> Tensor:
        return apply(self.down_DF, self.inner(x_TD), self._bias(-1))

    def inner(self, x_TD: Tensor) -> Tensor:
        """The input of the down matrix, [T, F]."""
        gate_TF = None if self.gate_FD is None else apply(self.gate_FD, x_TD, self._bias(0))
        return activate(self.act, gate_TF, apply(self.up_FD, x_TD, self._bias(-2)))

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """gate, up and down, or up and down, as `Family.matrices` names them."""
        return (self.up_FD, self.down_DF) if self.gate_FD is None else (self.gate_FD, self.up_FD, self.down_DF)

    def with_matrices(self, matrices: Sequence[Matrix]) -> "MLP":
        """The same network with other matrices, given in the order of `matrices`."""
        *gate, up_FD, down_DF = matrices
        return replace(self, gate_FD=gate[0] if gate else None, up_FD=up_FD, down_DF=down_DF)

    def to(self, **where: Any) -> "MLP":
        moved = self.with_matrices([m.to(**where) for m in self.matrices])
        return replace(moved, biases=tuple(b.to(**where) for b in self.biases))

    def _bias(self, at: int) -> Tensor | None:
        return self.biases[at] if self.biases else None


@dataclass(frozen=True)
class MoELayer:
    """The MoE block of one decoder layer."""

    router: Router
    router_ED: Tensor
    experts: tuple[MLP, ...]
    shared: MLP | None = None
    shared_gate_1D: Tensor | None = None
    offset_E: Tensor | None = None  # a bias of the router's logits

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    def to(self, **where: Any) -> "MoELayer":
        """The same layer on another device (`device=`) or in another precision (`dtype=`); the router's bias stays fp32."""
        bias_E = self.router.bias_E
        return MoELayer(
            router=replace(self.router, bias_E=None if bias_E is None else bias_E.to(device=where.get("device"))),
            router_ED=self.router_ED.to(**where),
            experts=tuple(e.to(**where) for e in self.experts),
            shared=None if self.shared is None else self.shared.to(**where),
            shared_gate_1D=None if self.shared_gate_1D is None else self.shared_gate_1D.to(**where),
            offset_E=None if self.offset_E is None else self.offset_E.to(**where),
        )

    def keep(self, experts: list[int]) -> "MoELayer":
        """The layer with only these experts, renumbered in this order."""
        return replace(
            self,
            router=self.router.keep(experts),
            router_ED=self.router_ED[experts],
            experts=tuple(self.experts[e] for e in experts),
            offset_E=None if self.offset_E is None else self.offset_E[experts],
        )

    def logits(self, x_TD: Tensor) -> Tensor:
        """Router logits [T, E], in the precision in which the family computes them."""
        if self.router.arch.router_fp32:
            return linear(x_TD.float(), self.router_ED.float(), None if self.offset_E is None else self.offset_E.float())
        return linear(x_TD, self.router_ED, self.offset_E)

    def expert_input(self, x_TD: Tensor, logits_TE: Tensor, expert: int) -> Tensor:
        """What this expert sees of tokens: themselves, or, in a family that weighs inputs, times their routing weight."""
        if not self.router.arch.weighs_input:
            return x_TD
        return x_TD * self.router.scores(logits_TE[..., expert : expert + 1]).to(x_TD.dtype)

    def expert_outputs(self, x_TD: Tensor) -> Tensor:
        """The output of every expert for every token, whether routed there or not: [T, E, D]."""
        logits_TE = self.logits(x_TD) if self.router.arch.weighs_input else x_TD
        return torch.stack([expert(self.expert_input(x_TD, logits_TE, e)) for e, expert in enumerate(self.experts)], dim=1)

    def shared_output(self, x_TD: Tensor) -> Tensor | None:
        """The output of the shared expert for every token, [T, D]; None if the family has none."""
        if self.shared is None:
            return None
        y_TD = self.shared(x_TD)
        return y_TD if self.shared_gate_1D is None else linear(x_TD, self.shared_gate_1D).sigmoid() * y_TD

    def routed_output(self, x_TD: Tensor, allowed_E: Tensor | None = None) -> Tensor:
        """The weighted sum of the chosen experts' outputs, [T, D]. Each expert runs on its own tokens only."""
        logits_TE = self.logits(x_TD)
        weights_Tk, index_Tk = self.router.choose(logits_TE, allowed_E)
        out_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index_Tk == e)
            if len(token):
                y_tD = expert(self.expert_input(x_TD[token], logits_TE[token], e))
                out_TD.index_add_(0, token, y_tD * weights_Tk[token, slot, None])
        return out_TD.to(x_TD.dtype)

    def __call__(self, x_TD: Tensor, allowed_E: Tensor | None = None) -> Tensor:
        """The output of the MoE block [T, D], before the residual is added."""
        out_TD, shared_TD = self.routed_output(x_TD, allowed_E), self.shared_output(x_TD)
        return out_TD if shared_TD is None else out_TD + shared_TD

    def weights(self, x_TD: Tensor, allowed_E: Tensor | None = None) -> Tensor:
        """The weights of all experts' outputs [T, E], fp32; zero outside the top k, one inside where inputs are weighed."""
        return dense(*self.router.choose(self.logits(x_TD), allowed_E), self.num_experts)
