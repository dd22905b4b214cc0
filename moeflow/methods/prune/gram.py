"""One MoE layer on fixed tokens, prepared once, so that any subset of its experts can be evaluated exactly and quickly.

Shapes are suffixes: T tokens, D model width, E experts, N experts and "none", S subsets. The error of a subset is the sum of c' G c
over tokens, where G is the Gram matrix of the experts' outputs for the token and c the change of its routing weights (the distance
is from Lu et al., ACL 2024, section 3.2; the identity is ours).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from moeflow.methods.prune.ranked import Ranked, chunks, ranked
from moeflow.model.alternatives import slices
from moeflow.model.moe import MoELayer
from moeflow.model.router import Router, dense

MAX_BYTES = 2 << 30
"""The most bytes that the Gram matrices of one layer may take."""

PREPARED_AT_ONCE = 1 << 24
"""The most elements in the expert outputs of a chunk of tokens."""


@dataclass(frozen=True)
class Routed:
    """Tokens that must be routed anew for every subset (`Router.chooses_again`)."""

    router: Router
    logits_TE: Tensor
    base_TE: Tensor  # the full layer's routing weights
    gram_TEE: Tensor

    def squared_errors(self, mask_SE: Tensor) -> Tensor:
        """The summed squared error of every subset, fp64 [S]."""
        subsets, experts = mask_SE.shape
        error_S = torch.zeros(subsets, dtype=torch.float64, device=mask_SE.device)
        for rows in chunks(self.logits_TE, subsets * experts):
            c_tSE = dense(*self.router.choose(self.logits_TE[rows, None], mask_SE), experts) - self.base_TE[rows, None]
            error_S += torch.bmm(c_tSE, self.gram_TEE[rows]).mul_(c_tSE).sum(2).double().sum(0)
        return error_S


@dataclass(frozen=True)
class Weighed:
    """Computes how much any subset of a layer's experts changes its output on the prepared tokens.

    A call with a mask of allowed experts (bool [S, E]) returns the Frobenius distance of the layer's output from that with all
    experts, fp64 [S]. Gram matrices are kept in fp32: a squared error is accurate to about 1e-6 of itself or 1e-7 of the output's
    squared norm, whichever is more. If a token's scores tie, the expert with the lower number is chosen.
    """

    pieces: tuple[Ranked | Routed, ...]
    experts: int
    drop_at_most: int
    norm: Tensor  # the squared norm of the output, fp64 []
    tokens: int

    @staticmethod
    @torch.inference_mode()
    def of(moe: MoELayer, batches: Iterable[Tensor], *, drop_at_most: int | None = None) -> "Weighed":
        """Prepare `moe` on batches of its inputs x_TD; `room` says for how many tokens.

        Subsets may drop `drop_at_most` experts (by default all but top_k), so each expert runs only on the tokens that can reach
        it. Raises ValueError if that is out of range, and if there are no tokens.
        """
        experts, most = moe.num_experts, moe.num_experts - moe.router.top_k
        drop_at_most = most if drop_at_most is None else drop_at_most
        if not 0 <= drop_at_most <= most:
            raise ValueError(
                f"drop_at_most={drop_at_most} must lie between 0 and {most}: {experts} experts, top_k={moe.router.top_k}"
            )
        pieces: list[Ranked | Routed] = []
        norm, tokens = torch.zeros((), dtype=torch.float64, device=moe.router_ED.device), 0
        step = max(1, PREPARED_AT_ONCE // (_vectors(moe, drop_at_most) * moe.router_ED.shape[1]))
        for x_TD in batches:
            for rows in slices(len(x_TD), step):
                piece, square = _prepared(moe, x_TD[rows], drop_at_most)
                pieces.append(piece)
                norm += square
            tokens += len(x_TD)
        if not tokens:
            raise ValueError("no tokens to weigh the experts on; give at least one")
        return Weighed(tuple(pieces), experts, drop_at_most, norm, tokens)

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
        legal_EN = legal_EN & mask_E[:, None] & ~pad(mask_E, (0, 1))
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


def room(moe: MoELayer, drop_at_most: int, max_bytes: int = MAX_BYTES) -> int:
    """The number of tokens whose Gram matrices of `moe` fit into `max_bytes`."""
    vectors = _vectors(moe, drop_at_most)
    # the matrix; the order, values and base; and all logits
    return max_bytes // (4 * vectors * vectors + 16 * vectors + 4 * moe.num_experts)


def _vectors(moe: MoELayer, drop_at_most: int) -> int:
    """How many experts' outputs a token's Gram matrix holds."""
    return moe.num_experts if moe.router.chooses_again else min(moe.num_experts, moe.router.top_k + drop_at_most)


def _moved(mask_E: Tensor, out_S: Tensor, into_S: Tensor) -> Tensor:
    """S copies of the mask, bool [S, E]: each loses expert `out_S` and gains expert `into_S`, or none if that is E."""
    mask_SN = pad(mask_E, (0, 1)).repeat(len(out_S), 1)
    return mask_SN.scatter_(1, out_S[:, None], False).scatter_(1, into_S[:, None], True)[:, :-1]


def _prepared(moe: MoELayer, x_TD: Tensor, drop_at_most: int) -> tuple[Ranked | Routed, Tensor]:
    """These tokens, prepared, and the squared norm of the layer's output, fp64 []."""
    logits_TE = moe.logits(x_TD)
    quick = None if moe.router.chooses_again else ranked(moe, x_TD, logits_TE, drop_at_most)
    piece, norm = quick or _routed(moe, x_TD, logits_TE)
    return piece, norm if moe.shared is None else moe(x_TD).double().square().sum()


def _routed(moe: MoELayer, x_TD: Tensor, logits_TE: Tensor) -> tuple[Routed, Tensor]:
    """These tokens as `Routed`, and the squared norm of the routed output, fp64 []."""
    y_TED = moe.expert_outputs(x_TD).double()
    full_TE = dense(*moe.router.choose(logits_TE), moe.num_experts)
    norm = torch.bmm(full_TE.double()[:, None], y_TED).square().sum()
    return Routed(moe.router, logits_TE, full_TE, torch.bmm(y_TED, y_TED.mT).float()), norm
