"""One MoE layer of any family as plain tensors, and the arithmetic that all methods share.

Shapes are suffixes: T tokens, D model width, F expert width, E experts, k experts a token, M outputs and N inputs of a matrix, R
rank. This file knows neither files nor transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from moeflow.model.router import Router, dense

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "swish": silu, "gelu": gelu}


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


def apply(matrix: Matrix, x_TN: Tensor) -> Tensor:
    """Rows [T, N] times a matrix [M, N], transposed: [T, M]."""
    return linear(linear(x_TN, matrix.in_RN), matrix.out_MR) if isinstance(matrix, LowRank) else linear(x_TN, matrix)


def whole(matrix: Matrix) -> Tensor:
    """The matrix as one tensor, multiplied out if it is low-rank."""
    return matrix.whole() if isinstance(matrix, LowRank) else matrix


@dataclass(frozen=True)
class MLP:
    """A gated feed-forward network: one routed expert, or the shared one."""

    gate_FD: Matrix
    up_FD: Matrix
    down_DF: Matrix
    act: str = "silu"

    def __call__(self, x_TD: Tensor) -> Tensor:
        return apply(self.down_DF, self.inner(x_TD))

    def inner(self, x_TD: Tensor) -> Tensor:
        """The input of the down matrix, [T, F]."""
        return ACTIVATIONS[self.act](apply(self.gate_FD, x_TD)) * apply(self.up_FD, x_TD)

    @property
    def matrices(self) -> tuple[Matrix, Matrix, Matrix]:
        """gate, up and down."""
        return self.gate_FD, self.up_FD, self.down_DF

    def to(self, **where: Any) -> "MLP":
        return MLP(self.gate_FD.to(**where), self.up_FD.to(**where), self.down_DF.to(**where), self.act)


@dataclass(frozen=True)
class MoELayer:
    """The MoE block of one decoder layer."""

    router: Router
    router_ED: Tensor
    experts: tuple[MLP, ...]
    shared: MLP | None = None
    shared_gate_1D: Tensor | None = None

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
        )

    def keep(self, experts: list[int]) -> "MoELayer":
        """The layer with only these experts, renumbered in this order."""
        return replace(
            self,
            router=self.router.keep(experts),
            router_ED=self.router_ED[experts],
            experts=tuple(self.experts[e] for e in experts),
        )

    def logits(self, x_TD: Tensor) -> Tensor:
        """Router logits [T, E], in the precision in which the family computes them."""
        if self.router.arch.router_fp32:
            return linear(x_TD.float(), self.router_ED.float())
        return linear(x_TD, self.router_ED)

    def expert_outputs(self, x_TD: Tensor) -> Tensor:
        """The output of every expert for every token, whether routed there or not: [T, E, D]."""
        return torch.stack([expert(x_TD) for expert in self.experts], dim=1)

    def shared_output(self, x_TD: Tensor) -> Tensor | None:
        """The output of the shared expert for every token, [T, D]; None if the family has none."""
        if self.shared is None:
            return None
        y_TD = self.shared(x_TD)
        return y_TD if self.shared_gate_1D is None else linear(x_TD, self.shared_gate_1D).sigmoid() * y_TD

    def routed_output(self, x_TD: Tensor, allowed_E: Tensor | None = None) -> Tensor:
        """The weighted sum of the chosen experts' outputs, [T, D]. Each expert runs on its own tokens only."""
        weights_Tk, index_Tk = self.router.choose(self.logits(x_TD), allowed_E)
        out_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index_Tk == e)
            if len(token):
                out_TD.index_add_(0, token, expert(x_TD[token]) * weights_Tk[token, slot, None])
        return out_TD.to(x_TD.dtype)

    def __call__(self, x_TD: Tensor, allowed_E: Tensor | None = None) -> Tensor:
        """The output of the MoE block [T, D], before the residual is added."""
        out_TD, shared_TD = self.routed_output(x_TD, allowed_E), self.shared_output(x_TD)
        return out_TD if shared_TD is None else out_TD + shared_TD

    def weights(self, x_TD: Tensor, allowed_E: Tensor | None = None) -> Tensor:
        """Routing weights over all experts [T, E], fp32; zero outside the top k."""
        return dense(*self.router.choose(self.logits(x_TD), allowed_E), self.num_experts)
