"""Low-rank matrices that change the outputs on an expert's tokens least. The reference is torch.linalg.svd."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moeflow.methods.decompose.lowrank import components, energies, vanilla
from moeflow.methods.moments import Moments, expert_moments, layer_moments, second_moment
from moeflow.model.moe import MLP, LowRank, MoELayer
from moeflow.model.router import Router
from tests.layers import MIXTRAL

SHAPES = [(20, 36), (36, 20), (24, 24)]
KINDS = ["inputs", "outputs"]


@torch.no_grad()
def output_error(w_MN: Tensor, other: Tensor | LowRank, input_moment_NN: Tensor) -> Tensor:
    """The root of the summed squared change of the outputs over the moment's tokens where `other` stands for the matrix, fp64."""
    other_MN = other.out_MR.double() @ other.in_RN.double() if isinstance(other, LowRank) else other.double()
    change_MN = w_MN.double() - other_MN
    return ((change_MN @ input_moment_NN.double()) * change_MN).sum((-2, -1)).clamp(min=0).sqrt()


def tokens(columns: int, count: int = 200, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs [T, N] of which some directions are a thousand times stronger than others."""
    draw = torch.Generator().manual_seed(seed)
    strength_N = torch.logspace(0, -3, columns, dtype=dtype)
    mix_NN = torch.linalg.qr(torch.randn(columns, columns, generator=draw, dtype=dtype))[0]
    return torch.randn(count, columns, generator=draw, dtype=dtype) * strength_N @ mix_NN


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def whitened(w_MN: Tensor, rank: int, **how: Any) -> LowRank:
    return components(w_MN, rank=rank, **how).truncated(rank)


def moment(kind: str, w_MN: Tensor, x_TN: Tensor) -> dict[str, Tensor]:
    if kind == "inputs":
        return {"input_moment_NN": second_moment(x_TN)}
    return {"output_moment_MM": second_moment(x_TN @ w_MN.mT)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_error_of_the_outputs_is_the_root_of_the_discarded_squared_singular_values(rows: int, columns: int, kind: str) -> None:
    """It is a theorem, on both sides; no matrix of that rank does better, vanilla's included."""
    w_MN, x_TN = matrix(rows, columns), tokens(columns)
    values_K = torch.linalg.svdvals(w_MN @ x_TN.mT)[: min(rows, columns)]
    parts = components(w_MN, **moment(kind, w_MN, x_TN))
    torch.testing.assert_close(parts.energy_K, values_K.square(), rtol=1e-9, atol=1e-12 * float(values_K[0] ** 2))
    for rank in (1, 7, min(rows, columns) - 1):
        error = torch.linalg.vector_norm((parts.truncated(rank).whole().double() - w_MN) @ x_TN.mT)
        exact = torch.linalg.vector_norm((w_MN - parts.truncated(rank).out_MR @ parts.truncated(rank).in_RN) @ x_TN.mT)
        torch.testing.assert_close(exact, values_K[rank:].square().sum().sqrt(), rtol=1e-7, atol=0.0)
        torch.testing.assert_close(exact, parts.error(rank), rtol=1e-7, atol=0.0)
        torch.testing.assert_close(output_error(w_MN, parts.truncated(rank), second_moment(x_TN)), exact, rtol=1e-7, atol=0.0)
        assert float(error) < float(output_error(w_MN, vanilla(w_MN, rank), second_moment(x_TN)))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_vanilla_is_the_truncated_singular_value_decomposition(rows: int, columns: int) -> None:
    w_MN = matrix(rows, columns, dtype=torch.float32)
    u_MK, s_K, v_KN = torch.linalg.svd(w_MN.double(), full_matrices=False)
    cut = vanilla(w_MN, 9)
    assert cut.out_MR.shape == (rows, 9) and cut.in_RN.shape == (9, columns) and cut.in_RN.dtype == torch.float32
    torch.testing.assert_close(cut.whole().double(), u_MK[:, :9] * s_K[:9] @ v_KN[:9], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(energies(w_MN), s_K.square())
    torch.testing.assert_close(cut.out_MR.norm(dim=0), cut.in_RN.norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_full_rank_reproduces_the_matrix(rows: int, columns: int, dtype: torch.dtype) -> None:
    w_MN, rank = matrix(rows, columns).to(dtype), min(rows, columns)
    close = dict(rtol=0.0, atol={torch.float64: 2e-5, torch.float32: 2e-5, torch.bfloat16: 0.06}[dtype])
    cuts = [whitened(w_MN, rank, **moment(kind, w_MN.double(), tokens(columns))) for kind in KINDS]
    for cut in [vanilla(w_MN, rank), *cuts]:
        assert cut.out_MR.dtype == dtype
        torch.testing.assert_close(cut.whole().double(), w_MN.double(), **close)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_fp32_finds_the_optimum_also_where_it_alone_would_not(rows: int, columns: int, kind: str) -> None:
    """A batch of experts, one of them with an input ten thousand times stronger than the rest, as real models have them."""
    w_BMN, rank = matrix(3, rows, columns).float(), 6
    x_BTN = torch.stack([tokens(columns, seed=seed) for seed in (1, 2, 3)])
    x_BTN[1] = torch.randn(200, columns, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x_BTN[1, :, 3] *= 1e5
    each = [moment(kind, w.double(), x) for w, x in zip(w_BMN, x_BTN, strict=True)]
    stacked = {name: torch.stack([m[name] for m in each]) for name in each[0]}
    before = w_BMN.clone()
    cut = whitened(w_BMN, rank, **stacked)
    assert torch.equal(w_BMN, before)
    for b, one in enumerate(each):
        best = torch.linalg.svdvals(w_BMN[b].double() @ x_BTN[b].mT)[rank:].square().sum().sqrt()
        reached = torch.linalg.vector_norm((w_BMN[b].double() - cut.out_MR[b].double() @ cut.in_RN[b].double()) @ x_BTN[b].mT)
        assert float(reached / best) < (1.3 if b == 1 else 1.001)  # the factors themselves are fp32
        basis = components(w_BMN, **stacked, rank=rank).error(rank)[b]
        torch.testing.assert_close(basis, best, rtol=1e-3, atol=0.0)
        alone = whitened(w_BMN[b], rank, **one)
        torch.testing.assert_close(alone.whole(), cut.out_MR[b] @ cut.in_RN[b], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_fewer_tokens_than_inputs_are_no_obstacle(rows: int, columns: int) -> None:
    """The moment is singular: the tokens seen are reproduced, and `shrink` lets the matrix itself say what else is kept."""
    w_MN, x_TN = matrix(rows, columns), tokens(columns, count=5)
    known = {"input_moment_NN": second_moment(x_TN)}
    cut = whitened(w_MN, 8, **known)
    assert float(torch.linalg.vector_norm((cut.out_MR @ cut.in_RN - w_MN) @ x_TN.mT)) < 1e-6
    shrunk = whitened(w_MN, 8, **known, shrink=1e-3)

    def far(other: Tensor) -> float:
        return float(torch.linalg.vector_norm(other - w_MN))

    plain = vanilla(w_MN, 8)
    assert far(plain.out_MR @ plain.in_RN) < far(shrunk.out_MR @ shrunk.in_RN) < far(cut.out_MR @ cut.in_RN)
    strong = whitened(w_MN, 8, **known, shrink=1e9)
    torch.testing.assert_close(strong.out_MR @ strong.in_RN, plain.out_MR @ plain.in_RN, rtol=1e-5, atol=1e-5)


def layer(width: int, inner: int) -> MoELayer:
    experts = tuple(
        MLP(*(matrix(*s, seed=10 * e + i).float() for i, s in enumerate([(inner, width), (inner, width), (width, inner)])))
        for e in range(4)
    )
    return MoELayer(Router(MIXTRAL, top_k=2), matrix(4, width, seed=99).float(), experts)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("width", "inner"), [(12, 20), (20, 12)])
def test_the_moments_of_two_shards_added_are_those_of_one_run(width: int, inner: int, weighted: bool) -> None:
    moe, x_TD = layer(width, inner), tokens(width).float()
    whole = list(layer_moments(moe, x_TD, weighted=weighted))
    shards = [layer_moments(moe, part, weighted=weighted) for part in (x_TD[:70], x_TD[70:])]
    if not weighted:  # every token reaches two experts
        energy = sum(m["gate"]["input_moment_NN"].trace() for m in whole)
        torch.testing.assert_close(energy, 2 * x_TD.double().square().sum(), rtol=1e-5, atol=0.0)
    for one, (a, b) in zip(whole, zip(*shards, strict=True), strict=True):
        assert list(one["down"]) == ["input_moment_NN" if width > inner else "output_moment_MM"]
        for matrix_name in ("gate", "up", "down"):
            ((name, expected),) = one[matrix_name].items()
            total = a[matrix_name][name] + b[matrix_name][name]
            assert total.dtype == torch.float64
            torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6 * float(expected.max()))


def test_moments_are_of_the_tokens_routed_to_the_expert_times_their_weights() -> None:
    """So that the down matrix's error is that of the layer's output, to which each expert adds its weighted outputs."""
    moe, x_TD = layer(12, 20), tokens(12).float()
    weights_TE, e = moe.weights(x_TD), 2
    mine = weights_TE[:, e] > 0
    rows_TD = (x_TD * weights_TE[:, e : e + 1])[mine].double()
    moments: Moments = list(layer_moments(moe, x_TD))[e]
    torch.testing.assert_close(moments["gate"]["input_moment_NN"], rows_TD.mT @ rows_TD, rtol=1e-5, atol=1e-7)
    down_DF = moe.experts[e].down_DF
    assert isinstance(down_DF, Tensor)
    cut = whitened(down_DF, 5, **moments["down"])
    change_TD = (replace(moe.experts[e], down_DF=cut)(x_TD) - moe.experts[e](x_TD)) * weights_TE[:, e : e + 1]
    expected = components(down_DF, **moments["down"]).error(5)
    torch.testing.assert_close(torch.linalg.vector_norm(change_TD.double()), expected, rtol=1e-3, atol=0.0)
    unweighted = expert_moments(moe.experts[e], x_TD[mine])["up"]["input_moment_NN"]
    torch.testing.assert_close(unweighted, x_TD[mine].double().mT @ x_TD[mine].double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s[:-1, :-1], "has shape .* the matrix asks for"),
        (lambda s: s * float("nan"), "of matrix 0 is not finite"),
        (lambda s: torch.stack([s[0], s[1] * float("inf")]), "of matrix 1 is not finite"),
        (lambda s: torch.stack([s[0], 0 * s[1]]), "of matrix 1 is zero: no tokens were seen"),
        (lambda s: s.tril(), "of matrix 0 is not symmetric"),
        (lambda s: s - 0.5 * s.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None] * torch.eye(s.shape[-1]), "negative diagonal"),
        (lambda s: s + 30 * (s - torch.diag_embed(s.diagonal(dim1=-2, dim2=-1))), "not positive semidefinite"),
    ],
    ids=["shape", "nan", "inf", "zero", "asymmetric", "diagonal", "indefinite"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_moment_that_is_none_is_refused_in_one_line(dtype: torch.dtype, damage, message: str, kind: str) -> None:
    w_BMN = matrix(2, 20, 36, dtype=dtype)
    one = [moment(kind, w.double(), tokens(36, seed=b)) for b, w in enumerate(w_BMN)]
    name = next(iter(one[0]))
    stacked = torch.stack([m[name] for m in one])
    shape_only = stacked[..., :-1, :-1] if "shape" in message else damage(stacked)
    with pytest.raises(ValueError, match=message) as caught:
        whitened(w_BMN, 4, **{name: shape_only})
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_size_of_the_pieces_changes_nothing(rows: int, columns: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w_MN, x_TN = matrix(rows, columns), tokens(columns)
    whole = moment(kind, w_MN, x_TN)
    at_once = whitened(w_MN, 9, **whole)
    for module in ("moments", "decompose.lowrank"):
        monkeypatch.setattr(f"moeflow.methods.{module}.COLUMNS_AT_ONCE", 7)
    monkeypatch.setattr("moeflow.methods.moments.TOKENS_AT_ONCE", 30)
    ((name, again),) = moment(kind, w_MN, x_TN).items()
    torch.testing.assert_close(again, whole[name])
    pieces = whitened(w_MN, 9, **whole)
    torch.testing.assert_close(pieces.out_MR @ pieces.in_RN, at_once.out_MR @ at_once.in_RN)
    again[-1, 0] += again.max()
    with pytest.raises(ValueError, match="not symmetric"):
        whitened(w_MN, 9, **{name: again})


def test_what_cannot_be_asked_for_is_refused() -> None:
    w_MN, x_TN = matrix(20, 36), tokens(36)
    for rank in (0, 21):
        for cut in (vanilla, lambda w, r: whitened(w, r, **moment("inputs", w, x_TN))):
            with pytest.raises(ValueError, match=f"rank={rank} must lie between 1 and .* 20"):
                cut(w_MN, rank)
    for cut in (vanilla, lambda w, r: whitened(w, r, **moment("inputs", w, x_TN))):
        with pytest.raises(ValueError, match="the weight is not finite"):
            cut(w_MN / 0, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_matrix_that_sees_nothing_of_its_tokens_has_components_without_energy(
    rows: int, columns: int, dtype: torch.dtype, kind: str
) -> None:
    """All eigenvalues are rounding errors then, of either sign, and no damage."""
    x_TN = tokens(columns, count=4)
    seen_NN = torch.linalg.qr(x_TN.mT)[0]
    w_MN = matrix(rows, columns)
    blind_MN = (w_MN - w_MN @ seen_NN @ seen_NN.mT).to(dtype)
    known = moment(kind, blind_MN, x_TN.to(dtype))
    parts = components(blind_MN, rank=8, **known)
    assert 0 <= float(parts.energy_K.sum()) < 1e-6 * float(second_moment(x_TN).trace()) * float(w_MN.square().sum())
    assert torch.isfinite(parts.truncated(8).whole()).all()
