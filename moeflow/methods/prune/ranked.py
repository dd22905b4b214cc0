"""The error of any subset of experts, for routers that take the first k allowed experts in an order that no subset changes.

These are routers without groups whose scores are softmax without a bias, or one of each expert by itself. Shapes are suffixes: T
tokens (t of them at once), D model width, E experts, S subsets, k experts a token, V the first experts in a token's order; C kept
and P dropped experts, N the dropped ones and "none"; M pairs of a token and an expert that may enter, q = k + 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from moeflow.model.alternatives import slices
from moeflow.model.moe import MoELayer

ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}
"""The most elements of an intermediate tensor: enough for a core's cache, or to keep a GPU busy."""

STEEPEST = 80.0
"""The largest difference between the logits of a token's first and last expert whose exponential is a normal number in fp32."""

SMALLEST = 1e-37
"""The smallest divisor for weights, so that sigmoids that are all zero in fp32 do not become NaN."""


def chunks(tokens: Tensor, each: int) -> Iterator[slice]:
    """Divide the rows of `tokens` so that intermediate tensors with `each` elements a row have at most `ELEMENTS`."""
    return slices(len(tokens), max(1, ELEMENTS[tokens.device.type] // each))


@dataclass(frozen=True)
class Ranked:
    """The Gram matrix of each token's first experts, in the order in which its router prefers them.

    The weight of a chosen expert is `scale` * v / (sum of v over `over`), where v is its `value`. The layer's error is the sum of
    the experts' outputs, each multiplied by its weight minus its `base`.
    """

    top_k: int
    scale: float
    over: str  # "chosen", "allowed" or "nothing"
    order_TV: Tensor  # the expert's number
    value_TV: Tensor
    base_TV: Tensor  # its weight in the full layer
    gram_TVV: Tensor
    value_TE: Tensor  # of all experts, by number; without columns unless `over` is "allowed"

    def squared_errors(self, mask_SE: Tensor) -> Tensor:
        """The summed squared error of every subset, fp64 [S]."""
        subsets, vectors = len(mask_SE), self.order_TV.shape[1]
        mask_ES = mask_SE.mT.float()
        before_VV = mask_ES.new_ones(vectors, vectors).tril()
        error_S = torch.zeros(subsets, dtype=torch.float64, device=mask_SE.device)
        for rows in chunks(self.order_TV, vectors * subsets):
            order_tV = self.order_TV[rows]
            c_tVS = mask_ES.index_select(0, order_tV.flatten()).view(*order_tV.shape, subsets)
            rank_tVS = torch.bmm(before_VV.expand(len(order_tV), -1, -1), c_tVS)
            c_tVS.masked_fill_(rank_tVS > self.top_k, 0.0).mul_(self.value_TV[rows, :, None])
            if self.over == "chosen":
                c_tVS.mul_(self.scale / c_tVS.sum(1, keepdim=True).clamp(min=SMALLEST))
            elif self.over == "allowed":
                c_tVS.mul_(self.scale / (self.value_TE[rows] @ mask_ES)[:, None])
            else:
                c_tVS.mul_(self.scale)
            c_tVS.sub_(self.base_TV[rows, :, None])
            error_S += torch.bmm(self.gram_TVV[rows], c_tVS).mul_(c_tVS).sum(1).double().sum(0)
        return error_S

    def neighbours(self, mask_E: Tensor, *, exchanges: bool = True) -> Tensor:
        """The summed squared errors of all subsets that are one removal or (with `exchanges`) one exchange away, fp64 [E, E + 1].

        Row a, column b: the kept expert a is dropped, and the dropped b comes back; last column: a is dropped, and none comes back.
        Other entries are 0.

        A token's choice q_1..q_k changes in few ways: q_i leaves, and either the next allowed expert after q_k enters, or a dropped
        one that the router prefers to it. Most tokens have few of these, so all exchanges together cost about as much as a few
        subsets.
        """
        experts = len(mask_E)
        kept_C, dropped_P = mask_E.nonzero()[:, 0], (~mask_E & exchanges).nonzero()[:, 0]
        place_E = torch.empty_like(mask_E, dtype=torch.int64)
        place_E[kept_C] = torch.arange(len(kept_C), device=mask_E.device)
        place_E[dropped_P] = torch.arange(len(dropped_P), device=mask_E.device)
        error_CN = torch.zeros(len(kept_C), len(dropped_P) + 1, dtype=torch.float64, device=mask_E.device)
        for rows in chunks(self.order_TV, error_CN.numel()):
            error_CN += self._neighbours(rows, mask_E, kept_C, dropped_P, place_E)
        error_EN = torch.zeros(experts, experts + 1, dtype=torch.float64, device=mask_E.device)
        columns_N = torch.cat([dropped_P, dropped_P.new_tensor([experts])])
        error_EN[kept_C[:, None], columns_N] = error_CN
        return error_EN

    def _neighbours(self, rows: slice, mask_E: Tensor, kept_C: Tensor, dropped_P: Tensor, place_E: Tensor) -> Tensor:
        k, order_tV = self.top_k, self.order_TV[rows]
        base_tV = torch.bmm(self.gram_TVV[rows], self.base_TV[rows, :, None])[..., 0].double()
        rest = (self.base_TV[rows] * base_tV).sum()
        allowed_tV = mask_E[order_tV]
        rank_tV = allowed_tV.cumsum(1)
        slot_tk = (allowed_tV & (rank_tV <= k)).nonzero()[:, 1].view(-1, k)
        next_tV = allowed_tV & (rank_tV == k + 1)
        may_tV = next_tV | (~allowed_tV & (rank_tV <= k)) if len(dropped_P) else next_tV
        token_M, enter_M = may_tV.nonzero().unbind(1)

        # the present choice; and, for each expert that may enter, the choice without each chosen expert in turn
        token_t = torch.arange(len(slot_tk), device=mask_E.device)
        square_t1, cross_t1 = self._forms(rows, token_t, slot_tk, base_tV, torch.ones(1, k, device=mask_E.device))
        seat_Mq = torch.cat([slot_tk[token_M], enter_M[:, None]], 1)
        square_Mk, cross_Mk = self._forms(rows, token_M, seat_Mq, base_tV, 1 - torch.eye(k, k + 1, device=mask_E.device))

        row_Mk, column_M1 = place_E[order_tV.gather(1, slot_tk)][token_M], place_E[order_tV[token_M, enter_M]][:, None]
        next_M, ahead_M = next_tV[token_M, enter_M], rank_tV[token_M, enter_M] < k

        def table(old_t1: Tensor, new_Mk: Tensor) -> Tensor:
            """The value after every exchange, [t, C, N]."""
            table_tCN = old_t1[..., None].expand(-1, len(kept_C), len(dropped_P) + 1).clone()
            # a chosen expert leaves, and the next enters, whichever comes back
            table_tCN[token_M[next_M, None], row_Mk[next_M]] = new_Mk[next_M][..., None]
            # an expert that was not chosen leaves: the one that comes back pushes out the last chosen one
            table_tCN[token_M[ahead_M], :, column_M1[ahead_M, 0]] = new_Mk[ahead_M, -1, None]
            table_tCN[token_M[~next_M, None], row_Mk[~next_M], column_M1[~next_M]] = new_Mk[~next_M]
            return table_tCN

        if self.over != "allowed":
            old_t1, new_Mk = square_t1 - 2 * cross_t1, square_Mk - 2 * cross_Mk
            # changes are summed, so fp32 is enough, and an unchanged error stays exactly the same
            change_tCN = table(torch.zeros_like(old_t1, dtype=torch.float32), (new_Mk - old_t1[token_M]).float())
            return change_tCN.sum(0).double() + old_t1.sum() + rest
        value_tC = self.value_TE[rows][:, kept_C].double()
        come_tN = pad(self.value_TE[rows][:, dropped_P].double(), (0, 1))
        # the sum without the leaving expert, added up and not subtracted, since its value may be nearly the whole sum
        before_tC, behind_tC = (pad(t.cumsum(1)[:, :-1], (1, 0)) for t in (value_tC, value_tC.flip(1)))
        over_tCN = (before_tC + behind_tC.flip(1))[..., None] + come_tN[:, None]
        return ((table(square_t1, square_Mk) / over_tCN - 2 * table(cross_t1, cross_Mk)) / over_tCN).sum(0) + rest

    def _forms(self, rows: slice, token_M: Tensor, seat_Mq: Tensor, base_tV: Tensor, stay_kq: Tensor) -> tuple[Tensor, Tensor]:
        """The squared norm of the weighted sum of the experts in these seats, and its product with the base, both fp64 [M, k].

        In each of the k cases, the experts that `stay` share the weight. If weights are over all allowed experts, they are not
        divided yet.
        """
        gram_Mqq = self.gram_TVV[rows][token_M[:, None, None], seat_Mq[:, :, None], seat_Mq[:, None]].double()
        weight_Mkq = self.value_TV[rows][token_M[:, None], seat_Mq].double()[:, None] * stay_kq
        if self.over == "chosen":
            weight_Mkq = weight_Mkq / weight_Mkq.sum(2, keepdim=True).clamp(min=SMALLEST)
        weight_Mkq = weight_Mkq * self.scale
        cross_Mk = (weight_Mkq * base_tV[token_M[:, None], seat_Mq][:, None]).sum(2)
        return (torch.bmm(weight_Mkq, gram_Mqq) * weight_Mkq).sum(2), cross_Mk


def ranked(moe: MoELayer, x_TD: Tensor, logits_TE: Tensor, drop_at_most: int) -> tuple[Ranked, Tensor] | None:
    """These tokens as `Ranked`, and the squared norm of the routed output, fp64 []; None if exponentials would leave fp32's range.

    Each expert runs only on the tokens that can reach it when `drop_at_most` experts are missing.
    """
    router, experts = moe.router, moe.num_experts
    k, depth = router.top_k, min(experts, router.top_k + drop_at_most)
    softmax = router.arch.score == "softmax"
    if router.arch.weighs_input:
        value_TE, choice_TE, over = torch.ones_like(logits_TE, dtype=torch.float32), logits_TE.float(), "nothing"
    elif not softmax:
        value_TE = router.scores(logits_TE)
        choice_TE = value_TE if router.bias_E is None else value_TE + router.bias_E
        over = "chosen" if router.normalize else "nothing"
    else:
        value_TE, choice_TE = (logits_TE.float() - logits_TE.float().amax(1, keepdim=True)).exp(), logits_TE.float()
        over = "chosen" if router.normalize else "allowed"
    # stable, so that ties have a fixed order
    sorted_TV, order_TV = (t[:, :depth] for t in choice_TE.sort(dim=1, descending=True, stable=True))
    if softmax and len(sorted_TV) and float((sorted_TV[:, 0] - sorted_TV[:, -1]).max()) > STEEPEST:
        return None
    value_TV = value_TE.gather(1, order_TV)
    out_TVD = x_TD.new_empty(len(x_TD), depth, x_TD.shape[1])
    for e, expert in enumerate(moe.experts):
        token, slot = torch.where(order_TV == e)
        if len(token):
            out_TVD[token, slot] = expert(moe.expert_input(x_TD[token], logits_TE[token], e))
    out_TVD = out_TVD.double()
    weight_Tk = value_TV[:, :k].double() * router.scale
    if over == "chosen":
        weight_Tk /= value_TV[:, :k].double().sum(1, keepdim=True).clamp(min=SMALLEST)
    elif over == "allowed":
        weight_Tk /= value_TE.double().sum(1, keepdim=True)
    base_TV = torch.zeros_like(value_TV)
    base_TV[:, :k] = weight_Tk.float()
    norm = torch.bmm(weight_Tk[:, None], out_TVD[:, :k]).square().sum()
    gram_TVV = torch.bmm(out_TVD, out_TVD.mT).float()
    value_TE = value_TE if over == "allowed" else value_TE[:, :0].clone()
    return Ranked(k, router.scale, over, order_TV, value_TV.contiguous(), base_TV, gram_TVV, value_TE), norm
