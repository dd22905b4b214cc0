"""A layer's experts made sparse or quantized, from the tokens that were recorded: the tensor side of `slim`.

Shapes are suffixes: T tokens, D model width, F expert width, E experts, M rows and N columns of a matrix.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeflow.arch import MATRICES, Config, Family
from moeflow.methods.moments import second_moment
from moeflow.methods.recorded import placement
from moeflow.methods.records import Facts
from moeflow.methods.rewrite import link_all
from moeflow.methods.slim.awq import awq, fold
from moeflow.methods.slim.gptq import gptq, gptq_memory
from moeflow.methods.slim.grid import Grid
from moeflow.methods.slim.masks import magnitude, wanda
from moeflow.methods.slim.pattern import Pattern
from moeflow.methods.slim.quantized import Quantized
from moeflow.methods.slim.rounding import round_to_nearest
from moeflow.methods.slim.sparsegpt import sparsegpt, sparsegpt_memory
from moeflow.model.checkpoint import DTYPES, Tensors, read_expert, read_many, read_moe, save
from moeflow.model.formats import format_of
from moeflow.model.layout import LAYER, Files, file_for, headers
from moeflow.model.moe import MLP, LowRank, Matrix, whole
from moeflow.model.packed import pack
from moeflow.model.router import dense
from moeflow.step import Context

WORKING = 8 << 30
"""Bytes that experts which are treated together on a GPU may take beside their weights."""


@dataclass(frozen=True)
class How:
    """What `slim.slim` was asked for."""

    method: str
    pattern: str
    grid: Grid | None
    order: bool
    damp: float
    block: int
    least: int
    policy: str
    shared: bool
    chained: bool
    packed: bool
    stored: torch.dtype = torch.float32  # in which weights and scales are written: scales are such as it holds


Treated = Tensor | Quantized
FIELDS = {"gate": "gate_FD", "up": "up_FD", "down": "down_DF"}


@torch.inference_mode()
def rewrite(
    context: Context, config: Config, given: Any, seen: Sequence[Files], how: How,
    *, layer: int, part: int, parts: int, dtype: str,
) -> list[dict[str, Any]] | None:  # fmt: skip
    """Write the layer's file with slimmed experts and say for each, and for the shared one, what was done and lost.

    A layer that a run has left without experts is linked as it is, and the answer is None.

    One of several parts treats its share of the experts only; the first also writes what is not an expert, and the shared one.

    Lost is the squared change of a matrix's outputs on the expert's tokens, as a part of their squared norm.
    """
    family, tensors = Family.of(config), Tensors(given)
    if family.router(layer) not in tensors:
        if part == 0:
            link_all(context, given)
        return None
    block = _Block(tensors, config, layer, placement(config, dtype))
    block.chosen = list(range(block.count))[block.count * part // parts : block.count * (part + 1) // parts]
    x_TD = torch.cat([Tensors(s)["x_RD"] for s in seen]).to(**block.placed)
    weights_TE = block.weights(x_TD)
    treated = {n for e in range(block.count) for n in block.names(e)}
    result = {n: tensors[n] for n in tensors if file_for(n) == LAYER and n not in treated and part == 0}
    how = replace(how, stored=DTYPES[tensors.info[block.names(0)[0]].dtype])
    report: list[dict[str, Any]] = []
    if how.method == "awq":
        report = _awq(result, family, block, x_TD, weights_TE, how)
    else:
        for at, entry in enumerate(_experts(result, family, block, x_TD, weights_TE, how)):
            report.append(entry)
            context.progress(at + 1, len(block.chosen), "experts")
            if at == 0:
                _reserve(result, family, block, entry["expert"])
    if how.shared and (names := family.shared(layer)) and block.shared is not None and part == 0:
        gate, up, down = names
        shared, x_sD = block.shared, x_TD if how.method != "awq" else None
        if how.method == "awq":  # which has scaled its columns
            scaled = {m: result[n].to(x_TD.device, x_TD.dtype) for m, n in zip(MATRICES, (gate, up, down), strict=True)}
            shared = _with(shared, scaled)
        whole = {name: result.pop(name) for name in (gate, up, down)}
        report.append({"expert": "shared"} | _one(result, family, names, shared, x_sD, how))
        if report[-1]["by"] == "keep":
            result |= whole
    few = [e["expert"] for e in report if e["by"] != how.method]
    if few and how.method not in ("magnitude", "round_to_nearest"):
        context.note(f"layer {layer}: experts {few} saw fewer than {how.least} tokens and were treated by {how.policy}")
    save(result, context.out / LAYER)
    if part == 0:
        link_all(context, given, but=(LAYER, Facts.FILE))
    return report


def join(parts: Sequence[Files], out: Path) -> None:
    """Write the layer's file that parts of it make."""
    here = [{n: t for n, t in headers(part).items() if t.file == LAYER} for part in parts]
    save({n: t for part, info in zip(parts, here, strict=True) for n, t in read_many(part, info)}, out)


def _reserve(result: dict[str, Tensor], family: Family, block: "_Block", done: int) -> None:
    """Make room for what the other experts will become, shaped like what one has: between what is in use only for a while it
    would leave holes, and a layer would take half as much memory again."""
    stem = f"{family.experts(block.layer)}{done}."
    made = {n.removeprefix(stem): t for n, t in result.items() if n.startswith(stem)}
    for e in block.chosen:
        if block.shapes(e) == block.shapes(done):  # ranks may differ
            other = f"{family.experts(block.layer)}{e}."
            result |= {other + n: torch.empty_like(t) for n, t in made.items() if other + n not in result}


class _Block:
    """A layer's router and shared expert, and its routed experts as they are asked for: never all in memory at once."""

    def __init__(self, tensors: Tensors, config: Config, layer: int, placed: dict[str, Any]) -> None:
        self.tensors, self.layer, self.placed, self._config = tensors, layer, placed, config
        self._moe = read_moe(tensors, config, layer, experts=False).to(**placed)
        self.shared, self.count = self._moe.shared, len(self._moe.router_ED)
        self.chosen = list(range(self.count))
        shapes = {n: tensors.info[n].shape for n in tensors}
        self.low_rank = format_of(shapes, config, layer).low_rank

    def names(self, e: int) -> list[str]:
        """The matrices of an expert that are in the file, or their factors."""
        family = Family.of(self._config)
        names = [n for whole in family.expert(self.layer, e) for n in (whole, *family.factors(whole))]
        return [n for n in names if n in self.tensors]

    def shapes(self, e: int) -> list[Sequence[int]]:
        return [self.tensors.info[n].shape for n in self.names(e)]

    def weights(self, x_TD: Tensor) -> Tensor:
        """The routing weights [T, E] of tokens, zero for experts not chosen."""
        return dense(*self._moe.router.choose(self._moe.logits(x_TD)), self.count)

    def expert(self, e: int) -> MLP:
        return read_expert(self.tensors, self._config, self.layer, e).to(**self.placed)

    def all(self) -> dict[str, Tensor]:
        """Each matrix of all experts, [E, M, N]."""
        first = self.expert(0)
        found = {m: _matrix(first, m).new_empty(self.count, *_matrix(first, m).shape) for m in MATRICES}
        for e in range(self.count):
            expert = self.expert(e)
            for m in MATRICES:
                found[m][e] = _matrix(expert, m)
        return found


def _experts(
    result: dict[str, Tensor], family: Family, block: _Block, x_TD: Tensor, weights_TE: Tensor, how: How
) -> Iterator[dict[str, Any]]:
    """Treat the experts one after the other on a CPU, elsewhere as many together as memory allows."""
    for now in _together(block, how):
        tokens = [weights_TE[:, e].nonzero().squeeze(-1) for e in now]
        enough = [e for e, t in zip(now, tokens, strict=True) if len(t) >= how.least]
        if len(enough) > 1 and how.method not in ("magnitude", "round_to_nearest"):
            yield from _batch(result, family, block, enough, [x_TD[t] for t in tokens if len(t) >= how.least], how)
            now, tokens = (
                [e for e in now if e not in enough],
                [t for e, t in zip(now, tokens, strict=True) if e not in enough],
            )
        for e, t in zip(now, tokens, strict=True):
            x_tD = x_TD[t] if len(t) >= how.least else None
            if x_tD is None and how.policy == "keep":
                result |= {n: block.tensors[n] for n in block.names(e)}
            yield {"expert": e, "tokens": len(t)} | _one(result, family, family.expert(block.layer, e), block.expert(e), x_tD, how)


def _together(block: _Block, how: How) -> list[list[int]]:
    experts = block.chosen
    if block.placed["device"] == "cpu" or how.method not in ("sparsegpt", "gptq") or block.low_rank:
        return [[e] for e in experts]
    rows, columns = _matrix(block.expert(0), "gate").shape
    sides = ((rows, columns), (columns, rows))
    grid = how.grid
    of_one = max(
        (sparsegpt_memory(*s, block=how.block) if grid is None else gptq_memory(*s, grid=grid, order=how.order, block=how.block))
        for s in sides
    )
    size = max(1, WORKING // (of_one + 16 * max(rows, columns) ** 2 + 24 * rows * columns))
    return [experts[i : i + size] for i in range(0, len(experts), size)]


def _batch(
    result: dict[str, Tensor], family: Family, block: _Block, chosen: list[int], x_eTD: list[Tensor], how: How
) -> Iterator[dict[str, Any]]:
    """Treat experts that have tokens enough together, matrix by matrix."""
    experts = [block.expert(e) for e in chosen]
    width = [second_moment(x) for x in x_eTD]
    moment_EDD = torch.stack(width)
    made: dict[str, Treated] = {}
    for m in ("gate", "up"):
        made[m] = treat(torch.stack([_matrix(e, m) for e in experts]), moment_EDD, how)
    now = [
        _with(expert, {m: _whole(made[m][i], how.stored) for m in ("gate", "up")}) if how.chained else expert
        for i, expert in enumerate(experts)
    ]
    moment_EFF = torch.stack([second_moment(e.inner(x)) for e, x in zip(now, x_eTD, strict=True)])
    made["down"] = treat(torch.stack([_matrix(e, "down") for e in experts]), moment_EFF, how)
    for i, e in enumerate(chosen):
        lost = {}
        for m, name in zip(MATRICES, family.expert(block.layer, e), strict=True):
            moment_NN = (moment_EFF if m == "down" else moment_EDD)[i]
            lost[m] = _lost(_matrix(experts[i], m), _put(result, name, made[m][i], how), moment_NN)
        yield {"expert": e, "tokens": len(x_eTD[i]), "by": how.method, "lost": lost}


def _one(
    result: dict[str, Tensor], family: Family, names: tuple[str, str, str], expert: MLP, x_TD: Tensor | None, how: How
) -> dict[str, Any]:
    """Treat one expert, by its weights alone where there are no tokens of it to go by."""
    if x_TD is None and how.policy == "keep":
        return {"by": "keep", "lost": {}}
    moment_DD = None if x_TD is None else second_moment(x_TD)
    lost, by, inner = {}, how.method if x_TD is not None else how.policy, expert
    for m, name in zip(MATRICES, names, strict=True):
        moment_NN = moment_DD
        if m == "down" and x_TD is not None:
            moment_NN = second_moment(inner.inner(x_TD))
        before: Matrix = getattr(expert, FIELDS[m])
        now = _slimmed(result, family, name, before, moment_NN, how)
        lost[m] = _lost(whole(before), whole(now), moment_NN)
        if how.chained and x_TD is not None:
            inner = _with(inner, {m: now})
    return {"by": by, "lost": lost}


def _slimmed(result: dict[str, Tensor], family: Family, name: str, matrix: Matrix, moment_NN: Tensor | None, how: How) -> Matrix:
    """Write what a matrix becomes, or both that it is a product of: the one that sees the inputs, and then the other, by what the
    first, as it has become, gives it."""
    if isinstance(matrix, Tensor):
        return _put(result, name, treat(matrix, moment_NN, how), how)
    out, within = family.factors(name)
    in_RN = _put(result, within, treat(matrix.in_RN, moment_NN, how), how)
    moment_RR = None if moment_NN is None else in_RN.double() @ moment_NN @ in_RN.double().mT
    return LowRank(_put(result, out, treat(matrix.out_MR, moment_RR, how), how), in_RN)


def treat(w_MN: Tensor, moment_NN: Tensor | None, how: How) -> Treated:
    """A weight [M, N], or a batch of them, slimmed as `how` says; by the weights alone where there is no second moment. Inputs that
    were zero on every token count as white ones."""
    grid = how.grid
    if moment_NN is not None:
        silent = ~moment_NN.flatten(-2).any(-1)
        white_NN = torch.eye(moment_NN.shape[-1], dtype=moment_NN.dtype, device=moment_NN.device)
        moment_NN = torch.where(silent[..., None, None], white_NN, moment_NN)
    if grid is not None:
        if moment_NN is None or how.method == "round_to_nearest":
            return round_to_nearest(w_MN, grid, scale_dtype=how.stored)
        return gptq(w_MN, grid, moment=moment_NN, order=how.order, block=how.block, damp=how.damp, scale_dtype=how.stored)
    pattern = Pattern.parse(how.pattern)
    if moment_NN is None or how.method == "magnitude":
        return w_MN * magnitude(w_MN, pattern)
    if how.method == "wanda":
        return w_MN * wanda(w_MN, pattern, moment=moment_NN)
    return sparsegpt(w_MN, pattern, moment=moment_NN, block=how.block, damp=how.damp)


def _awq(
    result: dict[str, Tensor], family: Family, block: _Block, x_TD: Tensor, weights_TE: Tensor, how: How
) -> list[dict[str, Any]]:
    """All experts of a layer, and the scale of its inputs folded into the norm and everything else that the norm feeds."""
    assert how.grid is not None
    counts = (weights_TE > 0).sum(0).tolist()
    seen_TE = weights_TE * torch.tensor([c >= how.least for c in counts], device=weights_TE.device)
    experts = block.all()
    gate_EFD, up_EFD, down_EDF = (experts[m] for m in MATRICES)
    act = block.expert(0).act
    made = awq(gate_EFD, up_EFD, down_EDF, how.grid, inputs=x_TD, weights=seen_TE, act=act, scale_dtype=how.stored)
    norms = [n for n in result if n.startswith(family.norm(block.layer))]
    fed = [family.router(block.layer)]
    fed += (family.shared(block.layer) or ())[:2]
    fed += [gate] if (gate := family.shared_gate(block.layer)) else []
    scale_D = made.scale_D.cpu()
    for norm in norms:
        result[norm], *folded = fold(result[norm], scale_D, *(result[n] for n in fed))
    result |= dict(zip(fed, folded, strict=True))
    report = []
    for e in range(block.count):
        lost = {}
        token = weights_TE[:, e].nonzero().squeeze(-1)
        inner_TF = MLP(gate_EFD[e], up_EFD[e], down_EDF[e], act).inner(x_TD[token])
        moments = (second_moment(x_TD[token] / made.scale_D), None, second_moment(inner_TF / made.inner_EF[e]))
        scaled = (gate_EFD[e] * made.scale_D, up_EFD[e] * made.scale_D / made.inner_EF[e, :, None], down_EDF[e] * made.inner_EF[e])
        parts = (made.gate_EFD[e], made.up_EFD[e], made.down_EDF[e])
        for at, (m, name) in enumerate(zip(MATRICES, family.expert(block.layer, e), strict=True)):
            moment_NN = moments[at] if moments[at] is not None else moments[0]
            lost[m] = _lost(scaled[at], _put(result, name, parts[at], how), moment_NN if len(token) else None)
        by = "awq" if counts[e] >= how.least else how.policy
        report.append({"expert": e, "tokens": counts[e], "by": by, "lost": lost})
    return report


def _put(result: dict[str, Tensor], name: str, made: Treated, how: How) -> Tensor:
    """Write what a matrix has become, and give it, in fp32, as it is read again."""
    now_MN = _whole(made, how.stored)
    if how.packed and isinstance(made, Quantized):
        found = {name + end: t for end, t in pack(made.codes_MN.cpu(), made.scale_MG.cpu(), made.grid.bits).items()}
    else:
        found = {name: now_MN.cpu()}
    for name, t in found.items():
        result[name] = result[name].copy_(t) if name in result else t
    return now_MN.float()


def _lost(w_MN: Tensor, now_MN: Tensor, moment_NN: Tensor | None) -> float:
    """The part of a matrix's outputs that went, or of itself where nothing is known of its inputs."""
    change_MN, w_MN = now_MN.double() - w_MN.double(), w_MN.double()
    if moment_NN is None:
        return float(change_MN.square().sum() / w_MN.square().sum().clamp(min=1e-30))
    return float(((change_MN @ moment_NN) * change_MN).sum() / ((w_MN @ moment_NN) * w_MN).sum().clamp(min=1e-30))


def _matrix(expert: MLP, matrix: str) -> Tensor:
    w_MN = getattr(expert, FIELDS[matrix])
    assert isinstance(w_MN, Tensor)
    return w_MN


def _with(expert: MLP, matrices: Mapping[str, Matrix]) -> MLP:
    """The expert with other matrices, in the precision that it has."""
    held: dict[str, Matrix] = {m: getattr(expert, field) for m, field in FIELDS.items()}
    dtype = next(m.in_RN if isinstance(m, LowRank) else m for m in held.values()).dtype
    gate_FD, up_FD, down_DF = (matrices.get(m, held[m]).to(dtype=dtype) for m in MATRICES)
    return MLP(gate_FD, up_FD, down_DF, expert.act)


def _whole(made: Treated, dtype: torch.dtype = torch.float32) -> Tensor:
    return made.dequantized(dtype) if isinstance(made, Quantized) else made.to(dtype)
