"""Makes a layer's experts sparse or quantized, using the recorded tokens: the tensor side of `slim.layer`.

Shapes are suffixes: T tokens, D model width, F expert width, E experts, M rows and N columns of a matrix, R rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeflow.arch import MATRICES, Config, Family
from moeflow.methods.graph import load
from moeflow.methods.moments import inner_moment, second_moment
from moeflow.methods.rare import treatments
from moeflow.methods.recorded import placement
from moeflow.methods.records import Facts
from moeflow.methods.rewrite import link_all
from moeflow.methods.slim.awq import ScaledExperts, fold
from moeflow.methods.slim.correction import Seen, Wanted, corrected
from moeflow.methods.slim.methods import AT_ONCE, METHODS, Share, Slimming
from moeflow.methods.slim.quantized import Quantized
from moeflow.model.checkpoint import DTYPES, Tensors, read_expert, read_moe, save
from moeflow.model.formats import format_of
from moeflow.model.layout import LAYER, Files, file_for
from moeflow.model.moe import MLP, LowRank, Matrix, whole
from moeflow.model.packed import pack
from moeflow.model.passes import norm_offset
from moeflow.model.router import dense
from moeflow.step import Context

WORKING = {"cpu": 0, "cuda": AT_ONCE}
"""Bytes of working memory, beside the weights, for experts that are treated together, by device; one expert is always treated."""

ROUNDING = 1e-10
"""Squared outputs that are a smaller part of what weights and inputs of their sizes could give are rounding errors of fp32."""

Treated = Tensor | Quantized
Names = tuple[str, ...]


@dataclass(frozen=True)
class Routed:
    """What one expert sees of the recorded tokens."""

    x_TD: Tensor
    weight_T: Tensor
    """How much its outputs count."""
    lacks_TD: Tensor | None = None
    """What its outputs should make up for, beside the expert's own errors."""


@torch.inference_mode()
def rewrite(
    context: Context, config: Config, before: Any, observed: Sequence[Files], beside: Sequence[Files], how: Slimming,
    *, layer: int, share: Share, dtype: str,
) -> list[dict[str, Any]] | None:  # fmt: skip
    """Write the layer's file with slimmed experts, and return for each, and for the shared one, what was done and lost.

    If trimming removed the layer's experts, the layer is linked as it is, and None is returned.

    Each task treats its share of the experts; the first also writes everything else, and treats the shared expert.
    `beside`: what the original model's block is added to, of the same tokens, if `how.target` asks for it.

    Lost is the squared change of a matrix's outputs on the expert's tokens, relative to their squared norm; where a matrix makes
    up for others (`how.target`), what it misses of the outputs that it should give.
    """
    family, tensors = Family.of(config), Tensors(before)
    if family.router(layer) not in tensors:
        if share.first:
            link_all(context, before)
        return None
    now = Layer(tensors, config, layer, how, placement(config, dtype))
    chosen = share.of(now.count)
    x_TD = torch.cat([Tensors(shard)["x_RD"] for shard in observed]).to(**now.placed)
    weights_TE = now.weights(x_TD)
    lost_TD = lost_before(observed, beside) if how.target == "model" else None
    if share.first:
        experts = {n for e in range(now.count) for n in now.names(e)}
        now.out = {n: tensors[n] for n in tensors if file_for(n) == LAYER and n not in experts}
    report: list[dict[str, Any]] = []
    if how.row.needs == "tokens":
        report = _all_at_once(now, x_TD, weights_TE)
    else:
        for entry in _experts(now, chosen, x_TD, weights_TE, lost_TD):
            report.append(entry)
            context.progress(len(report), len(chosen), "experts")
            if len(report) == 1:
                now.reserve(chosen, entry["expert"])
    if how.shared and family.shared(layer) and share.first:
        report.append({"expert": "shared"} | _shared(now, x_TD))
    few = [e["expert"] for e in report if e["by"] != how.method]
    if few and how.row.needs != "weights":
        by = "keep" if how.rare == "keep" else how.row.fallback
        context.note(f"layer {layer}: experts {few} saw fewer than {how.least} tokens and were treated by {by}")
    save(now.out, context.out / LAYER)
    if share.first:
        link_all(context, before, but=(LAYER, Facts.FILE))
    return report


class Layer:
    """A layer that is being slimmed: its experts are read one by one, and `out` is what will be written."""

    def __init__(self, tensors: Tensors, config: Config, number: int, how: Slimming, placed: dict[str, Any]) -> None:
        self.tensors, self.config, self.number, self.how, self.placed = tensors, config, number, how, placed
        self.family = Family.of(config)
        self._moe = read_moe(tensors, config, number, experts=False).to(**placed)
        self.shared, self.count = self._moe.shared, len(self._moe.router_ED)
        self.low_rank = format_of({n: tensors.info[n].shape for n in tensors}, config, number).low_rank
        self.stored = DTYPES[tensors.info[self.names(0)[0]].dtype]  # the dtype of weights and scales in the file
        self.out: dict[str, Tensor] = {}

    def names(self, e: int) -> list[str]:
        """The names of an expert's matrices in the file, or of their factors."""
        names = [n for whole in self.matrices(e) for n in (whole, *self.family.factors(whole))]
        return [n for n in names if n in self.tensors]

    def shapes(self, e: int) -> list[Sequence[int]]:
        """The shapes of an expert's matrices in the file, or of their factors."""
        return [self.tensors.info[n].shape for n in self.names(e)]

    def matrices(self, e: int) -> Names:
        """The names of an expert's matrices when they are whole."""
        return self.family.expert(self.number, e)

    def weights(self, x_TD: Tensor) -> Tensor:
        """The routing weights [T, E] of tokens, zero for experts not chosen."""
        return dense(*self._moe.router.choose(self._moe.logits(x_TD)), self.count)

    def inputs(self, x_TD: Tensor, e: int) -> Tensor:
        """What expert `e` sees of these tokens."""
        return self._moe.expert_input(x_TD, self._moe.logits(x_TD), e) if self.family.arch.weighs_input else x_TD

    def expert(self, e: int) -> MLP:
        return read_expert(self.tensors, self.config, self.number, e).to(**self.placed)

    def all(self) -> list[Tensor]:
        """The gate, up and down matrices of all experts, stacked: [E, M, N]."""
        stacked = [torch.empty(self.count, *shape, **self.placed) for shape in self.shapes(0)]
        for e in range(self.count):
            for into, matrix in zip(stacked, self.expert(e).matrices, strict=True):
                into[e] = whole(matrix)
        return stacked

    def treat(self, w_MN: Tensor, moment_NN: Tensor | None) -> Treated:
        """Slim a matrix or a batch of them; without the second moment of the inputs, by the weights alone.

        If all inputs of a matrix were zero on every token, an identity moment stands in.
        """
        row = self.how.row if moment_NN is not None else METHODS[self.how.row.fallback]
        if moment_NN is not None:
            silent = ~moment_NN.flatten(-2).any(-1)
            white_NN = torch.eye(moment_NN.shape[-1], dtype=moment_NN.dtype, device=moment_NN.device)
            moment_NN = torch.where(silent[..., None, None], white_NN, moment_NN)
        made: Treated = load(row.code)(w_MN, moment_NN, self.how, self.stored)
        return made

    def put(self, name: str, made: Treated) -> Tensor:
        """Add a slimmed matrix to the output, and return it in fp32 as it will be read back."""
        now_MN = made.dequantized(self.stored) if isinstance(made, Quantized) else made.to(self.stored)
        if self.how.packs and isinstance(made, Quantized):
            zero_MG = None if made.zero_MG is None else made.zero_MG.cpu()
            parts = pack(made.codes_MN.cpu(), made.scale_MG.cpu(), made.grid.bits, zero_MG)
            written = {name + end: t for end, t in parts.items()}
        else:
            written = {name: now_MN.cpu()}
        for name, t in written.items():
            self.out[name] = self.out[name].copy_(t) if name in self.out else t
        return now_MN.float()

    def reserve(self, chosen: Sequence[int], done: int) -> None:
        """Allocate the output of the other experts at once, shaped like that of expert `done`: piecemeal, between short-lived
        tensors, it would leave holes, and a layer would take half as much memory again."""
        stem = f"{self.family.experts(self.number)}{done}."
        made = {n.removeprefix(stem): t for n, t in self.out.items() if n.startswith(stem)}
        for e in chosen:
            if self.shapes(e) == self.shapes(done):  # ranks may differ
                other = f"{self.family.experts(self.number)}{e}."
                self.out |= {other + n: torch.empty_like(t) for n, t in made.items() if other + n not in self.out}


def lost_before(observed: Sequence[Files], beside: Sequence[Files]) -> Tensor | None:
    """What the layers before have lost of what this layer's block is added to, [T, D] in fp32.

    None where the original's was not recorded, or the layer does not simply add.
    """
    original_TD = torch.cat([Tensors(shard)["beside_RD"] for shard in beside]) if beside else torch.zeros(0)
    if not len(original_TD):
        return None
    now_TD = torch.cat([Tensors(shard)["beside_RD"] for shard in observed])
    assert now_TD.shape == original_TD.shape, f"{tuple(now_TD.shape)} beside {tuple(original_TD.shape)}: not the same tokens"
    return original_TD.float() - now_TD.float()


def _routed(now: Layer, e: int, token: Tensor, x_TD: Tensor, weights_TE: Tensor, lost_TD: Tensor | None) -> Routed:
    """What expert `e` sees of its tokens. What was lost before is shared out so that the experts' outputs change least."""
    weight_TE = weights_TE[token].float()
    share_T = weight_TE[:, e] / weight_TE.square().sum(-1).clamp(min=1e-12)
    lacks_TD = None if lost_TD is None else share_T[:, None] * lost_TD[token.cpu()].to(share_T.device)
    return Routed(now.inputs(x_TD[token], e), weight_TE[:, e], lacks_TD)


def _experts(
    now: Layer, chosen: Sequence[int], x_TD: Tensor, weights_TE: Tensor, lost_TD: Tensor | None
) -> Iterator[dict[str, Any]]:
    """Treat the experts one by one on a CPU, elsewhere as many together as memory allows."""
    at_once = _at_once(now)
    for group in (chosen[i : i + at_once] for i in range(0, len(chosen), at_once)):
        tokens = {e: weights_TE[:, e].nonzero().squeeze(-1) for e in group}
        many = [e for e in group if len(tokens[e]) >= now.how.least]
        done: dict[int, dict[str, Any]] = {}
        if many:
            seen = [_routed(now, e, tokens[e], x_TD, weights_TE, lost_TD) for e in many]
            done |= zip(many, _treat(now, [now.matrices(e) for e in many], [now.expert(e) for e in many], seen), strict=True)
        for e in group:
            if e not in done and now.how.rare == "keep":
                now.out |= {n: now.tensors[n] for n in now.names(e)}
                done[e] = {"by": "keep", "lost": {}}
            elif e not in done:
                (done[e],) = _treat(now, [now.matrices(e)], [now.expert(e)], None)
            yield {"expert": e, "tokens": len(tokens[e])} | done[e]


def _at_once(now: Layer) -> int:
    """How many experts are treated together. Low-rank ones, whose ranks may differ, are treated one by one."""
    if not now.how.row.memory or now.low_rank:
        return 1
    (rows, columns), *_ = now.shapes(0)
    memory = load(now.how.row.memory)
    of_one = max(memory(rows, columns, now.how), memory(columns, rows, now.how))
    if now.how.target != "matrix":  # the sums by which it was moved stay until it is slimmed
        of_one += 8 * rows**2 + 8 * rows * columns
    return max(1, WORKING[now.placed["device"]] // (of_one + 16 * max(rows, columns) ** 2 + 24 * rows * columns))


def _treat(now: Layer, names: list[Names], experts: list[MLP], seen: list[Routed] | None) -> list[dict[str, Any]]:
    """Treat experts together, matrix by matrix; without tokens, by their weights alone. Say what was done and what each lost."""
    by = now.how.row.fallback if seen is None else now.how.method
    report: list[dict[str, Any]] = [{"by": by, "lost": {}} for _ in experts]
    moment_NN = None if seen is None else _stacked([second_moment(s.x_TD) for s in seen])
    inner, x_TN = experts, None if seen is None or not now.low_rank else seen[0].x_TD
    for at, m in enumerate(MATRICES[-len(experts[0].matrices) :]):
        if m == "down" and seen is not None:
            moment_NN = _stacked([inner_moment(e, s.x_TD) for e, s in zip(inner, seen, strict=True)])
            x_TN = None if x_TN is None else inner[0].inner(x_TN)
        before = [e.matrices[at] for e in experts]
        wanted = None
        if seen is not None and now.how.target != "matrix" and (m == "down" or now.low_rank):
            wanted = [_wanted(e, slimmed, at, s) for e, slimmed, s in zip(experts, inner, seen, strict=True)]
        after, missed = _slimmed(now, [name[at] for name in names], before, moment_NN, x_TN, wanted)
        for i, entry in enumerate(report):
            of_one_NN = moment_NN if moment_NN is None or len(experts) == 1 else moment_NN[i]
            entry["lost"][m] = missed[i] if missed else _lost(whole(before[i]), whole(after[i]), of_one_NN)
        if now.how.inputs == "sequential":
            inner = [_with(e, at, matrix) for e, matrix in zip(inner, after, strict=True)]
    return report


def _wanted(expert: MLP, slimmed: MLP, at: int, routed: Routed) -> Wanted:
    """What is wanted of matrix `at` of an expert: what it gave before the matrices that feed it were slimmed."""
    last = at == len(expert.matrices) - 1

    def seen(rows: slice) -> Seen:
        x_tD, weight_t1 = routed.x_TD[rows], routed.weight_T[rows, None]
        now_tN, before_tN = (weight_t1 * (e.inner(x_tD) if last else x_tD) for e in (slimmed, expert))
        lacks_tD = None if not last or routed.lacks_TD is None else weight_t1 * routed.lacks_TD[rows]
        return Seen(now_tN, before_tN, lacks_tD)

    return Wanted(len(routed.x_TD), seen)


def _slimmed(
    now: Layer, names: list[str], matrices: list[Matrix], moment_NN: Tensor | None, x_TN: Tensor | None,
    wanted: list[Wanted] | None,
) -> tuple[list[Matrix], list[float]]:  # fmt: skip
    """Slim a matrix, or one of each of several experts, and write them; first move each towards what is `wanted` of it.

    Returns them, and what each misses of that.

    If it is low-rank, slim the factor that sees the inputs `x_TN`, then the other by what the slimmed first makes of them: from the
    tokens themselves, since rounding would leave a product of matrices with sums of squares below zero.
    """
    if isinstance(matrices[0], LowRank):
        ((out, within),) = (now.family.factors(name) for name in names)
        in_RN, out_MR = now.put(within, now.treat(matrices[0].in_RN, moment_NN)), matrices[0].out_MR
        inner_TR = None if x_TN is None else x_TN.float() @ in_RN.mT
        moved = [corrected(out_MR, one.behind(in_RN, matrices[0].in_RN)) for one in wanted or ()]
        out_MR = moved[0].weight_MN if moved else out_MR
        out_MR = now.put(out, now.treat(out_MR, None if inner_TR is None else second_moment(inner_TR)))
        return [LowRank(out_MR, in_RN)], [one.missed(out_MR) for one in moved]
    wholes = [whole(m) for m in matrices]
    moved = [corrected(*pair) for pair in zip(wholes, wanted, strict=True)] if wanted else []
    made = now.treat(_stacked([one.weight_MN for one in moved] or wholes), moment_NN)
    after = [now.put(name, made if len(names) == 1 else made[i]) for i, name in enumerate(names)]
    return [*after], [one.missed(now_MN) for one, now_MN in zip(moved, after, strict=False)]


def _shared(now: Layer, x_TD: Tensor) -> dict[str, Any]:
    """Treat the shared expert, which every token reaches. If its columns have been scaled, go by its weights alone."""
    names, shared = now.family.shared(now.number), now.shared
    assert names is not None and shared is not None
    scaled = now.how.row.needs == "tokens"
    if scaled and now.how.rare == "keep":
        return {"by": "keep", "lost": {}}
    before = [now.out.pop(name) for name in names]
    if scaled:
        shared = shared.with_matrices([t.to(x_TD.device, x_TD.dtype) for t in before])
    seen = None if scaled else [Routed(x_TD, torch.ones_like(x_TD[:, 0]))]
    (done,) = _treat(now, [names], [shared], seen)
    return done


def _all_at_once(now: Layer, x_TD: Tensor, weights_TE: Tensor) -> list[dict[str, Any]]:
    """Treat all experts of a layer, and fold the scale of its inputs into the norm and everything else that the norm feeds."""
    how, family, number = now.how, now.family, now.number
    counts = (weights_TE > 0).sum(0).tolist()
    treated_by = treatments(counts, how.least, how.rare, method=how.method, by_weights=how.row.fallback)
    counted_TE = weights_TE * torch.tensor([n >= how.least for n in counts], device=weights_TE.device)
    gate_EFD, up_EFD, down_EDF = now.all()
    act = str(now.expert(0).act)  # a row of `ACTIVATIONS`, or the step would have been refused
    offset = norm_offset(now.config, number)
    made: ScaledExperts = load(how.row.code)(
        gate_EFD, up_EFD, down_EDF, how, inputs=x_TD, weights=counted_TE, act=act, scale_dtype=now.stored
    )
    fed = [family.router(number), *(family.shared(number) or ())[:2]]
    fed += [gate] if (gate := family.shared_gate(number)) else []
    scale_D = made.scale_D.cpu()
    for norm in [n for n in now.out if n.startswith(family.norm(number))]:
        beside = offset if norm.endswith("weight") else 0.0
        before_D = now.out[norm]
        after_D, *folded = fold(before_D.float() + beside, scale_D, *(now.out[n] for n in fed))
        now.out[norm] = (after_D - beside).to(before_D.dtype)
    now.out |= dict(zip(fed, folded, strict=True))
    report = []
    for e in range(now.count):
        lost = {}
        token = weights_TE[:, e].nonzero().squeeze(-1)
        inner_TF = MLP(gate_EFD[e], up_EFD[e], down_EDF[e], act).inner(x_TD[token])
        moment_DD, moment_FF = second_moment(x_TD[token] / made.scale_D), second_moment(inner_TF / made.inner_EF[e])
        scaled = (gate_EFD[e] * made.scale_D, up_EFD[e] * made.scale_D / made.inner_EF[e, :, None], down_EDF[e] * made.inner_EF[e])
        rounded = (made.gate_EFD[e], made.up_EFD[e], made.down_EDF[e])
        for at, (m, name) in enumerate(zip(MATRICES, now.matrices(e), strict=True)):
            if treated_by[e] == "keep":  # scaled, not rounded
                now.put(name, scaled[at])
                continue
            moment_NN = moment_FF if m == "down" else moment_DD
            lost[m] = _lost(scaled[at], now.put(name, rounded[at]), moment_NN if len(token) else None)
        report.append({"expert": e, "tokens": counts[e], "by": treated_by[e], "lost": lost})
    return report


def _lost(w_MN: Tensor, now_MN: Tensor, moment_NN: Tensor | None) -> float:
    """The squared change of a matrix's outputs relative to their squared norm; without a moment, that of its weights.

    Outputs that are zero within rounding count as large as their rounding errors.
    """
    change_MN, w_MN = now_MN.double() - w_MN.double(), w_MN.double()
    if moment_NN is None:
        return float(change_MN.square().sum() / w_MN.square().sum().clamp(min=1e-30))
    changed, norm = (((x_MN @ moment_NN) * x_MN).sum().clamp(min=0) for x_MN in (change_MN, w_MN))
    return float(changed / torch.maximum(norm, ROUNDING * w_MN.square().sum() * moment_NN.diagonal().sum()).clamp(min=1e-30))


def _stacked(each: list[Tensor]) -> Tensor:
    """Several matrices as a batch, a single one as it is."""
    return each[0] if len(each) == 1 else torch.stack(each)


def _with(expert: MLP, at: int, matrix: Matrix) -> MLP:
    """The expert with one of its matrices replaced, in its own dtype."""
    own, matrices = expert.matrices[at], list(expert.matrices)
    matrices[at] = matrix.to(dtype=(own.in_RN if isinstance(own, LowRank) else own).dtype)
    return expert.with_matrices(matrices)
