"""One MoE layer on fixed tokens, prepared once, so that any subset of its experts can be evaluated exactly and quickly.

Shapes are suffixes: T tokens, D model width, E experts, S subsets, V the vectors of a token (the experts' outputs and the target,
if any). The error of a subset is the sum of c' G c over tokens, where G is the token's Gram matrix and c the change of its routing
weights (the distance is from Lu et al., ACL 2024, section 3.2; the identity is ours).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from moeflow.methods.prune.ranked import ELEMENTS, Ranked, ranked
from moeflow.model.moe import MoELayer
from moeflow.model.router import Router, dense

MAX_BYTES = 2 << 30
"""The most bytes that the Gram matrices of one layer may take."""

PREPARED_AT_ONCE = 1 << 24
"""The most elements in the expert outputs of a chunk of tokens."""


@dataclass(frozen=True)
class Routed:
    """Tokens that must be routed anew for every subset: the router has groups, or is SparseMixer."""

    router: Router
    logits_TE: Tensor
    base_TV: Tensor
    gram_TVV: Tensor

    @property
    def nbytes(self) -> int:
        return self.logits_TE.nbytes + self.base_TV.nbytes + self.gram_TVV.nbytes

    def squared_errors(self, mask_SE: Tensor) -> Tensor:
        """The summed squared error of every subset, fp64 [S]."""
        subsets, experts = mask_SE.shape
        error_S = torch.zeros(subsets, dtype=torch.float64, device=mask_SE.device)
        step = max(1, ELEMENTS[mask_SE.device.type] // (subsets * experts))
        for at in range(0, len(self.logits_TE), step):
            rows = slice(at, at + step)
            c_tSV = (-self.base_TV[rows, None]).repeat(1, subsets, 1)
            c_tSV[..., :experts] += dense(*self.router.choose(self.logits_TE[rows, None], mask_SE), experts)
            error_S += torch.bmm(c_tSV, self.gram_TVV[rows]).mul_(c_tSV).sum(2).double().sum(0)
        return error_S


@dataclass(frozen=True)
class Weighed:
    """Computes how much any subset of a layer's experts changes its output on the prepared tokens.

    A call with a mask of allowed experts (bool [S, E]) returns the Frobenius distance of the layer's output from the target, fp64
    [S]. Gram matrices are kept in fp32: a squared error is accurate to about 1e-6 of itself or 1e-7 of the output's squared norm,
    whichever is more. If a token's scores tie, the expert with the lower number is chosen.
    """

    pieces: tuple[Ranked | Routed, ...]
    experts: int
    top_k: int
    drop_at_most: int
    norm: Tensor  # the squared norm of the target, fp64 []
    tokens: int
    left_out: int  # tokens that did not fit into `max_bytes`

    @staticmethod
    @torch.inference_mode()
    def of(
        moe: MoELayer, batches: Iterable[Tensor], targets: Iterable[Tensor] | None = None,
        *, drop_at_most: int | None = None, max_bytes: int = MAX_BYTES,
    ) -> "Weighed":  # fmt: skip
        """Prepare `moe` on batches of its inputs x_TD, against its own output or, batch by batch, against target_TD.

        Subsets may drop `drop_at_most` experts (by default all but top_k), so each expert runs only on the tokens that can reach
        it. The last tokens are left out if the Gram matrices would exceed `max_bytes`; `room` says how many fit. Raises ValueError
        if none fits, or if `drop_at_most` is out of range.
        """
        experts, top_k = moe.num_experts, moe.router.top_k
        most = experts - top_k
        drop_at_most = most if drop_at_most is None else drop_at_most
        if not 0 <= drop_at_most <= most:
            raise ValueError(f"drop_at_most={drop_at_most} must lie between 0 and {most}: {experts} experts, top_k={top_k}")
        fits = room(moe, drop_at_most, max_bytes, targeted=targets is not None)
        if not fits:
            raise ValueError(f"max_bytes={max_bytes} has no room for one token of {experts} experts; allow more")
        pieces: list[Ranked | Routed] = []
        norm: Tensor | None = None
        tokens = left_out = 0
        for x_TD, goal_TD in zip(batches, repeat(None) if targets is None else targets, strict=targets is not None):
            taken = min(len(x_TD), fits - tokens)
            left_out += len(x_TD) - taken
            width = experts if _chooses_again(moe.router) else min(experts, top_k + drop_at_most)
            step = max(1, PREPARED_AT_ONCE // (width * x_TD.shape[1]))
            for at in range(0, taken, step):
                rows = slice(at, min(at + step, taken))
                piece, square = _prepared(moe, x_TD[rows], None if goal_TD is None else goal_TD[rows], drop_at_most)
                norm = square if norm is None else norm + square
                pieces.append(piece)
            tokens += taken
        if norm is None:
            raise ValueError("no tokens to weigh the experts on; give at least one")
        return Weighed(tuple(pieces), experts, top_k, drop_at_most, norm, tokens, left_out)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    @torch.inference_mode()
    def squared_errors(self, mask_SE: Tensor) -> Tensor:
        """The squared errors of subsets, fp64 [S]. Raises ValueError if one drops more experts than was prepared for."""
        mask_SE = mask_SE.to(self.norm.device)
        dropped = int((~mask_SE).sum(1).max()) if len(mask_SE) else 0
        if mask_SE.shape[1] != self.experts or dropped > self.drop_at_most:
            raise ValueError(
                f"a subset drops {dropped} of {mask_SE.shape[1]} experts where {self.experts} were prepared for dropping "
                f"{self.drop_at_most} at most; prepare with a larger drop_at_most"
            )
        return torch.stack([piece.squared_errors(mask_SE) for piece in self.pieces]).sum(0).clamp(min=0)

    def __call__(self, mask_SE: Tensor) -> Tensor:
        return self.squared_errors(mask_SE).sqrt()

    @torch.inference_mode()
    def neighbours(self, mask_E: Tensor, legal_EN: Tensor) -> Tensor:
        """The distances of all subsets that are one exchange or removal away from the kept experts, fp64 [E, E + 1].

        Row a, column b: the kept expert a is dropped and the dropped b comes back; last column: a is dropped and none comes back.
        Only the entries in `legal_EN` (bool [E, E + 1]) are evaluated; all others are infinite.
        """
        mask_E, legal_EN = mask_E.to(self.norm.device), legal_EN.to(self.norm.device)
        legal_EN = legal_EN & mask_E[:, None] & ~torch.cat([mask_E, mask_E.new_zeros(1)])
        dropped = int((~mask_E).sum())
        if dropped >= self.drop_at_most:
            legal_EN[:, -1] = False
        error_EN = torch.zeros(legal_EN.shape, dtype=torch.float64, device=mask_E.device)
        routed = [piece for piece in self.pieces if isinstance(piece, Routed)]
        if routed and legal_EN.any():
            out, into = legal_EN.nonzero().unbind(1)
            for part in torch.arange(len(out), device=out.device).split(1024):
                error_EN[out[part], into[part]] = sum(p.squared_errors(_moved(mask_E, out[part], into[part])) for p in routed)
        for piece in self.pieces:
            if isinstance(piece, Ranked):
                error_EN += piece.neighbours(mask_E, exchanges=bool(legal_EN[:, :-1].any()))
        return error_EN.clamp(min=0).sqrt().masked_fill(~legal_EN, torch.inf)


def room(moe: MoELayer, drop_at_most: int, max_bytes: int = MAX_BYTES, *, targeted: bool = False) -> int:
    """The number of tokens whose Gram matrices of `moe` fit into `max_bytes`."""
    experts = moe.num_experts
    vectors = (experts if _chooses_again(moe.router) else min(experts, moe.router.top_k + drop_at_most)) + targeted
    # the matrix; the order, values and base; and all logits
    return max_bytes // (4 * vectors * vectors + 16 * vectors + 4 * experts)


def _chooses_again(router: Router) -> bool:
    """Must a token be routed anew for every subset, because the router does not just take its first k allowed experts?"""
    return router.groups > 1 or router.arch.score == "sparsemixer"


def _moved(mask_E: Tensor, out_S: Tensor, into_S: Tensor) -> Tensor:
    """S copies of the mask, bool [S, E]: each loses expert `out_S` and gains expert `into_S`, or none if that is E."""
    mask_SN = torch.cat([mask_E, mask_E.new_zeros(1)]).repeat(len(out_S), 1)
    return mask_SN.scatter_(1, out_S[:, None], False).scatter_(1, into_S[:, None], True)[:, :-1]


def _prepared(moe: MoELayer, x_TD: Tensor, target_TD: Tensor | None, drop_at_most: int) -> tuple[Ranked | Routed, Tensor]:
    logits_TE = moe.logits(x_TD)
    goal_TD, norm = None, None
    if target_TD is not None:
        shared_TD = moe.shared_output(x_TD)
        goal_TD = target_TD.double() if shared_TD is None else target_TD.double() - shared_TD.double()
        norm = target_TD.double().square().sum()
    quick = None if _chooses_again(moe.router) else ranked(moe, x_TD, logits_TE, goal_TD, drop_at_most)
    piece, square = quick or _routed(moe, x_TD, logits_TE, goal_TD)
    if norm is None and moe.shared is not None:
        norm = moe(x_TD).double().square().sum()
    return piece, square if norm is None else norm


def _routed(moe: MoELayer, x_TD: Tensor, logits_TE: Tensor, goal_TD: Tensor | None) -> tuple[Routed, Tensor]:
    """These tokens as `Routed`, and the squared norm of the full layer's routed output, fp64."""
    vectors_TVD = moe.expert_outputs(x_TD).double()
    full_TE = dense(*moe.router.choose(logits_TE), moe.num_experts)
    norm = torch.bmm(full_TE.double()[:, None], vectors_TVD).square().sum()
    base_TV = full_TE
    if goal_TD is not None:
        vectors_TVD = torch.cat([vectors_TVD, goal_TD[:, None]], 1)
        base_TV = torch.cat([torch.zeros_like(full_TE), torch.ones_like(full_TE[:, :1])], 1)
    return Routed(moe.router, logits_TE, base_TV, torch.bmm(vectors_TVD, vectors_TVD.mT).float()), norm
