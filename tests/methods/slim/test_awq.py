"""AWQ leaves the router alone and beats rounding; what cannot be slimmed is refused in one line; memory is what is said."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import linear, silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moeflow.methods.graph import load
from moeflow.methods.moments import second_moment
from moeflow.methods.slim import gptq, sparsegpt
from moeflow.methods.slim.awq import ScaledExperts, awq, balance, balance_one, clipped, fold
from moeflow.methods.slim.grid import Grid
from moeflow.methods.slim.methods import METHODS, Slimming
from moeflow.methods.slim.pattern import Pattern
from tests.slimmed import nearest, on

T, E, D, F = 300, 4, 32, 48
GRID = Grid(3, False, 16)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Layer:
    """A block with its norm: two of four experts for each token, never the last one, and a shared expert behind a gate."""

    def __init__(self) -> None:
        self.hidden_TD = drawn(T, D, seed=1)
        self.norm_D = torch.ones(D)
        self.norm_D[[3, 17]] = 30.0  # channels far stronger than the rest
        self.router_ED = drawn(E, D, seed=2) / self.norm_D
        self.gate_EFD, self.up_EFD, self.down_EDF = drawn(E, F, D, seed=3), drawn(E, F, D, seed=4), drawn(E, D, F, seed=5)
        self.shared = [drawn(F, D, seed=6), drawn(F, D, seed=7), drawn(1, D, seed=8)]
        self.shared_down_DF = drawn(D, F, seed=9)

    def x(self) -> Tensor:
        return self.hidden_TD / self.hidden_TD.square().mean(-1, keepdim=True).sqrt() * self.norm_D

    def weights(self) -> Tensor:
        score_TE = linear(self.x(), self.router_ED).softmax(-1)
        score_TE[:, -1] = 0
        best_Tk, index_Tk = score_TE.topk(2)
        return torch.zeros_like(score_TE).scatter_(1, index_Tk, best_Tk)

    def routed(self) -> Tensor:
        x_TD, weights_TE = self.x(), self.weights()
        each = [
            linear(silu(linear(x_TD, g)) * linear(x_TD, u), d)
            for g, u, d in zip(self.gate_EFD, self.up_EFD, self.down_EDF, strict=True)
        ]
        return (torch.stack(each, 1) * weights_TE[..., None]).sum(1)

    def __call__(self) -> Tensor:
        x_TD, (gate_FD, up_FD, gate_1D) = self.x(), self.shared
        shared_TD = linear(silu(linear(x_TD, gate_FD)) * linear(x_TD, up_FD), self.shared_down_DF)
        return self.routed() + linear(x_TD, gate_1D).sigmoid() * shared_TD

    def run(self) -> ScaledExperts:
        return awq(self.gate_EFD, self.up_EFD, self.down_EDF, on(GRID, "awq"), inputs=self.x(), weights=self.weights())

    def fold(self, scale_D: Tensor) -> None:
        self.norm_D, self.router_ED, self.gate_EFD, self.up_EFD, *self.shared = fold(
            self.norm_D, scale_D, self.router_ED, self.gate_EFD, self.up_EFD, *self.shared
        )


def test_awq_leaves_routing_and_the_block_as_they_were_but_for_rounding() -> None:
    """The authors' code folds the scale into the norm and forgets the router that the norm feeds."""
    layer = Layer()
    out_TD, logits_TE, weights_TE = layer(), linear(layer.x(), layer.router_ED), layer.weights()
    made = layer.run()
    assert float(made.scale_D.max() / made.scale_D.min()) > 2
    layer.fold(made.scale_D)
    torch.testing.assert_close(linear(layer.x(), layer.router_ED), logits_TE, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.weights() > 0, weights_TE > 0)
    torch.testing.assert_close(layer(), out_TD, rtol=1e-4, atol=1e-4 * float(out_TD.abs().max()))
    layer.up_EFD = layer.up_EFD / made.inner_EF[..., None]
    layer.down_EDF = layer.down_EDF * made.inner_EF[:, None]
    torch.testing.assert_close(layer(), out_TD, rtol=1e-4, atol=1e-4 * float(out_TD.abs().max()))


def test_awq_beats_rounding_where_some_channels_are_far_stronger() -> None:
    layer, plain = Layer(), Layer()
    wanted_TD = layer.routed()
    plain.gate_EFD, plain.up_EFD, plain.down_EDF = (
        nearest(w, GRID).dequantized() for w in (plain.gate_EFD, plain.up_EFD, plain.down_EDF)
    )
    made = layer.run()
    layer.fold(made.scale_D)
    layer.gate_EFD, layer.up_EFD, layer.down_EDF = (q.dequantized() for q in (made.gate_EFD, made.up_EFD, made.down_EDF))
    error, rounding = (float(torch.linalg.vector_norm(each.routed() - wanted_TD)) for each in (layer, plain))
    assert error < 0.8 * rounding


def test_an_expert_without_tokens_takes_no_part_and_is_rounded_with_the_shared_scale() -> None:
    layer = Layer()
    assert not layer.weights()[:, -1].any()
    made = layer.run()
    known = nearest(layer.gate_EFD[-1] * made.scale_D, GRID)
    assert torch.equal(made.gate_EFD[E - 1].codes_MN, known.codes_MN) and (made.inner_EF[-1] == 1).all()
    assert torch.equal(made.down_EDF[E - 1].codes_MN, nearest(layer.down_EDF[-1], GRID).codes_MN)
    layer.gate_EFD[-1] *= 100
    assert torch.equal(layer.run().scale_D, made.scale_D)


@pytest.mark.parametrize("group", [0, 16])
def test_the_scale_and_the_clipping_of_one_matrix_do_no_harm(group: int) -> None:
    """The error of the outputs is taken from the second moment, as from the inputs."""
    layer, grid = Layer(), Grid(3, True, group)
    w_EFD, x_TD = layer.gate_EFD, layer.x()
    moment_DD = second_moment(x_TD)
    scale_D = balance_one(w_EFD[0], grid, x_TD, moment_DD)
    torch.testing.assert_close(balance([w_EFD[0]], grid, x_TD, lambda form: linear(x_TD, form(w_EFD[0]))), scale_D)

    def error(w_FD: Tensor) -> float:
        return float(torch.linalg.vector_norm(linear(x_TD, w_FD - w_EFD[0])))

    cut_FD = clipped(w_EFD[0], grid, moment_DD)
    assert (cut_FD.abs() <= w_EFD[0].abs()).all()
    rounded = error(nearest(w_EFD[0], grid).dequantized())
    assert error(nearest(w_EFD[0] * scale_D, grid).dequantized() / scale_D) < rounded
    if not group:  # the groups' errors are minimized apart, so only one group a row gives the whole
        assert error(nearest(cut_FD, grid).dequantized()) <= rounded


def test_what_is_no_pattern_or_grid_is_refused_in_one_line() -> None:
    for text in ("half", "2:4:8", "a:b", "", "nan", "1.5", "0", "4:4", "0:4", "-1"):
        with pytest.raises(ValueError) as caught:
            Pattern.parse(text)
        assert "\n" not in str(caught.value) and "2:4" in str(caught.value)
    for values in ({"bits": 5}, {"group": -1}):
        with pytest.raises(ValueError, match=" must be "):
            Grid(**values)
    with pytest.raises(ValueError, match=r"group=48 does not divide 32 columns; give a divisor"):
        Grid(group=48).check(32)
    with pytest.raises(ValueError, match=r"pattern 2:5 asks for columns in groups of 5, which 32"):
        Pattern.parse("2:5").check(32)


def test_patterns_and_grids_are_known_without_torch() -> None:
    code = "import sys, moeflow.methods.slim.grid, moeflow.methods.slim.pattern; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "gptq"])
def test_bad_weights_and_statistics_are_refused_in_one_line(method: str) -> None:
    w_EMN, x_ETN = drawn(2, 6, 16, seed=0), drawn(2, 40, 16, seed=1)
    moment_ENN = x_ETN.mT @ x_ETN
    nan_EMN, bad_ENN = w_EMN.clone(), moment_ENN.clone()
    nan_EMN[1, 2, 3] = float("nan")
    bad_ENN[1, 2, 2] = float("inf")
    cases: list[tuple[Tensor, Tensor, str]] = [
        (nan_EMN, moment_ENN, "weight of matrix 1 is not finite"),
        (w_EMN[..., :13], moment_ENN[..., :13, :13], "does not divide|no multiple"),
    ]
    if method != "magnitude":
        cases += [
            (w_EMN, moment_ENN[:1], r"moment has shape \(1, 16, 16\), the matrix asks for \(2, 16, 16\)"),
            (w_EMN, moment_ENN[0], "moment has shape"),
            (w_EMN, bad_ENN, "moment of matrix 1 is not finite"),
            (w_EMN, -moment_ENN, "has a negative diagonal"),
            (w_EMN, moment_ENN.tril(), "not symmetric"),
        ]
    for w, moment, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            load(METHODS[method].code)(w, moment, Slimming(method, group=8))
        assert "\n" not in str(caught.value)


def test_sweeps_that_cannot_be_made_are_refused() -> None:
    for options in ({"damp": 0.0}, {"damp": float("nan")}, {"columns": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.* must "):
            Slimming("gptq", **options)
    w_MN, moment_NN = drawn(6, 16, seed=0), second_moment(drawn(40, 16, seed=1))
    indefinite_NN = moment_NN + 30 * (moment_NN - moment_NN.diagonal().diag())
    with pytest.raises(ValueError, match="not positive semidefinite within damp=0.01; raise damp"):
        gptq.gptq(w_MN, indefinite_NN, Slimming("gptq", group=0))


class Peak(TorchDispatchMode):
    """The most bytes that tensors made here have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.live = {key: one for key, one in self.live.items() if not one[0].expired()}
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            if storage._cdata not in before:
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return out


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize(("rows", "columns", "order"), [(512, 96, False), (64, 192, True)])
def test_memory_is_the_result_and_what_is_stated_however_many_experts_there_are(
    rows: int, columns: int, order: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w_EMN, x_ETN = drawn(6, rows, columns, seed=0), drawn(6, 2 * columns, columns, seed=1)
    moment_ENN = (x_ETN.mT @ x_ETN).double()
    how = on(Grid(4, False, 32), activation_order=order, columns=32)
    budget = at_once * gptq.memory(rows, columns, how)
    monkeypatch.setitem(sparsegpt.BUDGET, "cpu", budget)
    with Peak() as peak:
        made = gptq.gptq(w_EMN, moment_ENN, how)
    assert made.zero_MG is not None
    assert peak.most <= made.codes_MN.nbytes + made.scale_MG.nbytes + made.zero_MG.nbytes + budget
    for pattern in ("0.5", "2:4"):
        how = Slimming("sparsegpt", pattern=pattern, columns=32)
        budget = at_once * sparsegpt.memory(rows, columns, how)
        monkeypatch.setitem(sparsegpt.BUDGET, "cpu", budget)
        with Peak() as peak:
            out_EMN = sparsegpt.sparsegpt(w_EMN, moment_ENN, how)
        assert out_EMN.nbytes < peak.most <= out_EMN.nbytes + budget
