"""Makes a layer's experts sparse or quantized, using the recorded tokens: the tensor side of `slim.layer`.

Shapes are suffixes: T tokens, D model width, F expert width, E experts, M rows and N columns of a matrix, R rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeflow.arch import MATRICES, Config, Family
from moeflow.methods.graph import load
from moeflow.methods.moments import moment_behind, second_moment
from moeflow.methods.rare import treatments
from moeflow.methods.recorded import placement
from moeflow.methods.records import Facts
from moeflow.methods.rewrite import link_all
from moeflow.methods.slim.methods import METHODS, Slimming
from moeflow.methods.slim.quantized import Quantized
from moeflow.methods.slim.scaled import ScaledExperts, fold
from moeflow.model.checkpoint import DTYPES, Tensors, read_expert, read_many, read_moe, save
from moeflow.model.formats import format_of
from moeflow.model.layout import LAYER, Files, file_for, headers
from moeflow.model.moe import MLP, LowRank, Matrix, whole
from moeflow.model.packed import pack
from moeflow.model.router import dense
from moeflow.step import Context

WORKING = 8 << 30
"""Bytes of working memory, beside the weights, for experts that a GPU treats together."""

Treated = Tensor | Quantized
FIELDS = {"gate": "gate_FD", "up": "up_FD", "down": "down_DF"}


@torch.inference_mode()
def rewrite(
    context: Context, config: Config, given: Any, seen: Sequence[Files], how: Slimming,
    *, layer: int, part: int, parts: int, dtype: str,
) -> list[dict[str, Any]] | None:  # fmt: skip
    """Write the layer's file with slimmed experts, and return for each, and for the shared one, what was done and lost.

    If trimming removed the layer's experts, the layer is linked as it is, and None is returned.

    With several parts, each treats its share of the experts; the first also writes everything else, and treats the shared expert.

    Lost is the squared change of a matrix's outputs on the expert's tokens, relative to their squared norm.
    """
    family, tensors = Family.of(config), Tensors(given)
    if family.router(layer) not in tensors:
        if part == 0:
            link_all(context, given)
        return None
    now = Layer(tensors, config, layer, how, placement(config, dtype))
    now.chosen = list(range(now.count))[now.count * part // parts : now.count * (part + 1) // parts]
    x_TD = torch.cat([Tensors(s)["x_RD"] for s in seen]).to(**now.placed)
    weights_TE = now.weights(x_TD)
    experts = {n for e in range(now.count) for n in now.names(e)}
    now.out = {n: tensors[n] for n in tensors if file_for(n) == LAYER and n not in experts and part == 0}
    report: list[dict[str, Any]] = []
    if how.row.needs == "tokens":
        report = _all_at_once(now, x_TD, weights_TE)
    else:
        for at, entry in enumerate(_experts(now, x_TD, weights_TE)):
            report.append(entry)
            context.progress(at + 1, len(now.chosen), "experts")
            if at == 0:
                now.reserve(entry["expert"])
    if how.shared and family.shared(layer) and part == 0:
        report.append({"expert": "shared"} | _shared(now, x_TD))
    few = [e["expert"] for e in report if e["by"] != how.method]
    if few and how.row.needs != "weights":
        by = "keep" if how.rare == "keep" else how.row.fallback
        context.note(f"layer {layer}: experts {few} saw fewer than {how.least} tokens and were treated by {by}")
    save(now.out, context.out / LAYER)
    if part == 0:
        link_all(context, given, but=(LAYER, Facts.FILE))
    return report


def join(parts: Sequence[Files], out: Path) -> None:
    """Join the parts of a layer's file into one."""
    here = [{n: t for n, t in headers(part).items() if t.file == LAYER} for part in parts]
    save({n: t for part, info in zip(parts, here, strict=True) for n, t in read_many(part, info)}, out)


class Layer:
    """A layer that is being slimmed: its experts are read one by one, and `out` is what will be written."""

    def __init__(self, tensors: Tensors, config: Config, number: int, how: Slimming, placed: dict[str, Any]) -> None:
        self.tensors, self.config, self.number, self.how, self.placed = tensors, config, number, how, placed
        self.family = Family.of(config)
        self._moe = read_moe(tensors, config, number, experts=False).to(**placed)
        self.shared, self.count = self._moe.shared, len(self._moe.router_ED)
        self.chosen = list(range(self.count))
        self.low_rank = format_of({n: tensors.info[n].shape for n in tensors}, config, number).low_rank
        self.stored = DTYPES[tensors.info[self.names(0)[0]].dtype]  # the dtype of weights and scales in the file
        self.out: dict[str, Tensor] = {}

    def names(self, e: int) -> list[str]:
        """The names of an expert's matrices in the file, or of their factors."""
        names = [n for whole in self.matrices(e) for n in (whole, *self.family.factors(whole))]
        return [n for n in names if n in self.tensors]

    def matrices(self, e: int) -> tuple[str, ...]:
        """The names of an expert's gate, up and down matrices when they are whole."""
        return self.family.expert(self.number, e)

    def weights(self, x_TD: Tensor) -> Tensor:
        """The routing weights [T, E] of tokens, zero for experts not chosen."""
        return dense(*self._moe.router.choose(self._moe.logits(x_TD)), self.count)

    def expert(self, e: int) -> MLP:
        return read_expert(self.tensors, self.config, self.number, e).to(**self.placed)

    def all(self) -> dict[str, Tensor]:
        """Each matrix of all experts, stacked: [E, M, N]."""
        first = self.expert(0)
        stacked = {m: _matrix(first, m).new_empty(self.count, *_matrix(first, m).shape) for m in MATRICES}
        for e in range(self.count):
            expert = self.expert(e)
            for m in MATRICES:
                stacked[m][e] = _matrix(expert, m)
        return stacked

    def treat(self, w_MN: Tensor, moment_NN: Tensor | None) -> Treated:
        """Slim a matrix or a batch of them; without the second moment of the inputs, by the weights alone.

        If all inputs of a matrix were zero on every token, an identity moment stands in.
        """
        if moment_NN is None:
            return load(METHODS[self.how.row.fallback].code)(w_MN, None, self.how, self.stored)
        silent = ~moment_NN.flatten(-2).any(-1)
        white_NN = torch.eye(moment_NN.shape[-1], dtype=moment_NN.dtype, device=moment_NN.device)
        moment_NN = torch.where(silent[..., None, None], white_NN, moment_NN)
        return load(self.how.row.code)(w_MN, moment_NN, self.how, self.stored)

    def put(self, name: str, made: Treated) -> Tensor:
        """Add a slimmed matrix to the output, and return it in fp32 as it will be read back."""
        now_MN = _whole(made, self.stored)
        if self.how.packs and isinstance(made, Quantized):
            written = {name + end: t for end, t in pack(made.codes_MN.cpu(), made.scale_MG.cpu(), made.grid.bits).items()}
        else:
            written = {name: now_MN.cpu()}
        for name, t in written.items():
            self.out[name] = self.out[name].copy_(t) if name in self.out else t
        return now_MN.float()

    def keep(self, e: int) -> None:
        """Add an expert to the output unchanged."""
        self.out |= {n: self.tensors[n] for n in self.names(e)}

    def reserve(self, done: int) -> None:
        """Allocate the output of the other experts at once, shaped like that of expert `done`: piecemeal, between short-lived
        tensors, it would leave holes, and a layer would take half as much memory again."""
        stem = f"{self.family.experts(self.number)}{done}."
        made = {n.removeprefix(stem): t for n, t in self.out.items() if n.startswith(stem)}
        for e in self.chosen:
            if self._shapes(e) == self._shapes(done):  # ranks may differ
                other = f"{self.family.experts(self.number)}{e}."
                self.out |= {other + n: torch.empty_like(t) for n, t in made.items() if other + n not in self.out}

    def _shapes(self, e: int) -> list[Sequence[int]]:
        return [self.tensors.info[n].shape for n in self.names(e)]


def _experts(now: Layer, x_TD: Tensor, weights_TE: Tensor) -> Iterator[dict[str, Any]]:
    """Treat the experts one by one on a CPU, elsewhere as many together as memory allows."""
    for group in together(now):
        tokens = {e: weights_TE[:, e].nonzero().squeeze(-1) for e in group}
        many = [e for e in group if len(tokens[e]) >= now.how.least]
        if len(many) > 1:
            yield from _batch(now, many, [x_TD[tokens[e]] for e in many])
            group = [e for e in group if e not in many]
        for e in group:
            x_tD = x_TD[tokens[e]] if e in many else None
            if x_tD is None and now.how.rare == "keep":
                now.keep(e)
            yield {"expert": e, "tokens": len(tokens[e])} | _one(now, now.matrices(e), now.expert(e), x_tD)


def together(now: Layer) -> list[list[int]]:
    """The experts that are treated together: on a GPU as many as memory allows, otherwise one at a time."""
    if now.placed["device"] == "cpu" or not now.how.row.memory or now.low_rank:
        return [[e] for e in now.chosen]
    rows, columns = _matrix(now.expert(0), "gate").shape
    memory = load(now.how.row.memory)
    of_one = max(memory(rows, columns, now.how), memory(columns, rows, now.how))
    size = max(1, WORKING // (of_one + 16 * max(rows, columns) ** 2 + 24 * rows * columns))
    return [now.chosen[i : i + size] for i in range(0, len(now.chosen), size)]


def _batch(now: Layer, chosen: list[int], x_eTD: list[Tensor]) -> Iterator[dict[str, Any]]:
    """Treat experts with enough tokens together, matrix by matrix."""
    experts = [now.expert(e) for e in chosen]
    moment_EDD = torch.stack([second_moment(x) for x in x_eTD])
    made = {m: now.treat(torch.stack([_matrix(e, m) for e in experts]), moment_EDD) for m in ("gate", "up")}
    inner = experts
    if now.how.inputs == "sequential":
        inner = [_with(e, {m: _whole(made[m][i], now.stored) for m in ("gate", "up")}) for i, e in enumerate(experts)]
    moment_EFF = torch.stack([second_moment(e.inner(x)) for e, x in zip(inner, x_eTD, strict=True)])
    made["down"] = now.treat(torch.stack([_matrix(e, "down") for e in experts]), moment_EFF)
    for i, e in enumerate(chosen):
        lost = {}
        for m, name in zip(MATRICES, now.matrices(e), strict=True):
            moment_NN = (moment_EFF if m == "down" else moment_EDD)[i]
            lost[m] = _lost(_matrix(experts[i], m), now.put(name, made[m][i]), moment_NN)
        yield {"expert": e, "tokens": len(x_eTD[i]), "by": now.how.method, "lost": lost}


def _one(now: Layer, names: tuple[str, ...], expert: MLP, x_TD: Tensor | None) -> dict[str, Any]:
    """Treat one expert; without tokens, by its weights alone."""
    if x_TD is None and now.how.rare == "keep":
        return {"by": "keep", "lost": {}}
    moment_DD = None if x_TD is None else second_moment(x_TD)
    lost, inner = {}, expert
    for m, name in zip(MATRICES, names, strict=True):
        moment_NN = moment_DD
        if m == "down" and x_TD is not None:
            moment_NN = second_moment(inner.inner(x_TD))
        before: Matrix = getattr(expert, FIELDS[m])
        after = _slimmed(now, name, before, moment_NN)
        lost[m] = _lost(whole(before), whole(after), moment_NN)
        if now.how.inputs == "sequential" and x_TD is not None:
            inner = _with(inner, {m: after})
    return {"by": now.how.row.fallback if x_TD is None else now.how.method, "lost": lost}


def _slimmed(now: Layer, name: str, matrix: Matrix, moment_NN: Tensor | None) -> Matrix:
    """Slim a matrix and write it. If it is low-rank, slim the factor that sees the inputs, then the other by the outputs of the
    slimmed first."""
    if isinstance(matrix, Tensor):
        return now.put(name, now.treat(matrix, moment_NN))
    out, within = now.family.factors(name)
    in_RN = now.put(within, now.treat(matrix.in_RN, moment_NN))
    moment_RR = None if moment_NN is None else moment_behind(in_RN, moment_NN)
    return LowRank(now.put(out, now.treat(matrix.out_MR, moment_RR)), in_RN)


def _shared(now: Layer, x_TD: Tensor) -> dict[str, Any]:
    """Treat the shared expert, which every token reaches. If its columns have been scaled, go by its weights alone."""
    names = now.family.shared(now.number)
    assert names is not None and now.shared is not None
    shared, x_sD = now.shared, x_TD if now.how.row.needs != "tokens" else None
    if x_sD is None:
        scaled = {m: now.out[n].to(x_TD.device, x_TD.dtype) for m, n in zip(MATRICES, names, strict=True)}
        shared = _with(shared, scaled)
    before = {name: now.out.pop(name) for name in names}
    told = _one(now, names, shared, x_sD)
    if told["by"] == "keep":
        now.out |= before
    return told


def _all_at_once(now: Layer, x_TD: Tensor, weights_TE: Tensor) -> list[dict[str, Any]]:
    """Treat all experts of a layer, and fold the scale of its inputs into the norm and everything else that the norm feeds."""
    how, family, number = now.how, now.family, now.number
    counts = (weights_TE > 0).sum(0).tolist()
    treated_by = treatments(counts, how.least, how.rare, method=how.method, by_weights=how.row.fallback)
    counted_TE = weights_TE * torch.tensor([n >= how.least for n in counts], device=weights_TE.device)
    experts = now.all()
    gate_EFD, up_EFD, down_EDF = (experts[m] for m in MATRICES)
    act = now.expert(0).act
    made: ScaledExperts = load(how.row.code)(
        gate_EFD, up_EFD, down_EDF, how, inputs=x_TD, weights=counted_TE, act=act, scale_dtype=now.stored
    )
    fed = [family.router(number), *(family.shared(number) or ())[:2]]
    fed += [gate] if (gate := family.shared_gate(number)) else []
    scale_D = made.scale_D.cpu()
    for norm in [n for n in now.out if n.startswith(family.norm(number))]:
        now.out[norm], *folded = fold(now.out[norm], scale_D, *(now.out[n] for n in fed))
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
    """The squared change of a matrix's outputs relative to their squared norm; without a moment, that of its weights."""
    change_MN, w_MN = now_MN.double() - w_MN.double(), w_MN.double()
    if moment_NN is None:
        return float(change_MN.square().sum() / w_MN.square().sum().clamp(min=1e-30))
    return float(((change_MN @ moment_NN) * change_MN).sum() / ((w_MN @ moment_NN) * w_MN).sum().clamp(min=1e-30))


def _matrix(expert: MLP, matrix: str) -> Tensor:
    w_MN = getattr(expert, FIELDS[matrix])
    assert isinstance(w_MN, Tensor)
    return w_MN


def _with(expert: MLP, matrices: Mapping[str, Matrix]) -> MLP:
    """The expert with some matrices replaced, in its own dtype."""
    own: dict[str, Matrix] = {m: getattr(expert, field) for m, field in FIELDS.items()}
    dtype = next(m.in_RN if isinstance(m, LowRank) else m for m in own.values()).dtype
    gate_FD, up_FD, down_DF = (matrices.get(m, own[m]).to(dtype=dtype) for m in MATRICES)
    return MLP(gate_FD, up_FD, down_DF, expert.act)


def _whole(made: Treated, dtype: torch.dtype = torch.float32) -> Tensor:
    return made.dequantized(dtype) if isinstance(made, Quantized) else made.to(dtype)
