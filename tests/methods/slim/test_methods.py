"""Pruned and rounded matrices are those of the papers' released code; what the code got wrong is a promise here."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import slimming
from moeflow.methods.moments import second_moment
from moeflow.methods.slim.gptq import gptq, gptq_memory
from moeflow.methods.slim.grid import BITS, Grid
from moeflow.methods.slim.masks import lowest, magnitude, smallest_of_few, wanda
from moeflow.methods.slim.pattern import Pattern
from moeflow.methods.slim.rounding import round_to_nearest
from moeflow.methods.slim.sparsegpt import sparsegpt, sparsegpt_memory
from tests.running import GOLDEN

E, M, N = 3, 24, 64
GRIDS = [Grid(bits, symmetric, group) for bits in BITS for symmetric in (True, False) for group in (0, 16)]
PATTERNS = ["0.5", "2:4", "4:8", "1:4"]


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """Weights [E, M, N] of as many experts, and inputs, some directions stronger, of a different number of tokens each."""
    draw = torch.Generator().manual_seed(0)
    mix_NN = torch.randn(N, N, generator=draw) * torch.logspace(0, -1.5, N)
    w_EMN = torch.randn(E, M, N, generator=draw).to(dtype)
    return w_EMN, [torch.randn(150 + 40 * e, N, generator=draw) @ mix_NN for e in range(E)]


def moments(inputs: list[Tensor]) -> Tensor:
    return torch.stack([second_moment(x) for x in inputs])


def error(w_MN: Tensor, other_MN: Tensor, x_TN: Tensor) -> float:
    return float(torch.linalg.vector_norm((other_MN - w_MN).double() @ x_TN.reshape(-1, x_TN.shape[-1]).double().mT))


@pytest.fixture(scope="module")
def known() -> dict[str, Tensor]:
    return load_file(GOLDEN / "slim-3" / "linear.safetensors")


@pytest.mark.parametrize(("name", "pattern"), [("wanda_50", "0.5"), ("wanda_2of4", "2:4"), ("wanda_4of8", "4:8")])
def test_wanda_keeps_exactly_what_the_authors_code_keeps(known: dict[str, Tensor], name: str, pattern: str) -> None:
    w_MN, x_STN = known["weight"], known["inputs"]
    moment_NN = second_moment(x_STN.flatten(0, 1))
    for statistics in ({"inputs": x_STN}, {"moment": moment_NN}, {"moment": moment_NN.diagonal()}):
        assert torch.equal(w_MN * wanda(w_MN, pattern, **statistics), known[name])


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("sparsegpt_50_block32", "0.5", {}),
        ("sparsegpt_2of4_block32", "2:4", {}),
        ("gptq_4bit_sym_channel", Grid(4, True, 0), {}),
        ("gptq_3bit_sym_channel", Grid(3, True, 0), {}),
        ("gptq_4bit_asym_group32", Grid(4, False, 32), {}),
        ("gptq_4bit_sym_channel_actorder", Grid(4, True, 0), {"order": True}),
    ],
)
def test_sparsegpt_and_gptq_make_the_weights_of_the_authors_code(
    known: dict[str, Tensor], name: str, method: str | Grid, options: dict[str, bool]
) -> None:
    w_MN, x_STN = known["weight"], known["inputs"]
    for statistics in ({"inputs": x_STN}, {"moment": second_moment(x_STN.flatten(0, 1))}):
        if isinstance(method, Grid):
            made_MN = gptq(w_MN, method, block=32, **options, **statistics).dequantized()
        else:
            made_MN = sparsegpt(w_MN, method, block=32, **statistics)
        assert float(torch.isclose(made_MN, known[name], rtol=1e-4, atol=1e-5).double().mean()) >= 0.995
        assert error(w_MN, made_MN, x_STN) == pytest.approx(error(w_MN, known[name], x_STN), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [None, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_batch_is_pruned_as_its_matrices_one_after_the_other(pattern: str, at_once: int | None, dtype: torch.dtype) -> None:
    w_EMN, inputs = batch(dtype)
    before = w_EMN.clone()
    made_EMN = sparsegpt(w_EMN, pattern, moment=moments(inputs), block=24, at_once=at_once)
    assert torch.equal(w_EMN, before) and made_EMN.dtype == dtype
    kept_EMN, large_EMN = wanda(w_EMN, pattern, inputs=inputs), magnitude(w_EMN, pattern)
    for e in range(E):
        alone_MN = sparsegpt(w_EMN[e], pattern, inputs=inputs[e], block=24)
        assert torch.equal(made_EMN[e] == 0, alone_MN == 0)
        torch.testing.assert_close(made_EMN[e], alone_MN, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
        assert torch.equal(kept_EMN[e], wanda(w_EMN[e], pattern, moment=second_moment(inputs[e])))
        assert torch.equal(large_EMN[e], magnitude(w_EMN[e], pattern))


@pytest.mark.parametrize("at_once", [None, 2])
@pytest.mark.parametrize("order", [False, True], ids=["given", "by-energy"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_batch_is_rounded_as_its_matrices_one_after_the_other(grid: Grid, order: bool, at_once: int | None) -> None:
    """Codes fit their bits, and the outputs are nearer than where each weight is rounded to its nearest."""
    w_EMN, inputs = batch()
    made = gptq(w_EMN, grid, moment=moments(inputs), order=order, block=24, at_once=at_once)
    nearest = round_to_nearest(w_EMN, grid)
    for q in (made, nearest):
        assert q.codes_MN.dtype == torch.int8 and q.codes_MN.shape == w_EMN.shape and (q.zero_MG is None) == grid.symmetric
        assert q.scale_MG.shape == (E, M, grid.groups(N)) and q.nbytes == E * grid.nbytes(M, N, scale_bytes=4)
        for codes in (q.codes_MN, q.zero_MG) if q.zero_MG is not None else (q.codes_MN,):
            assert -(2 ** (grid.bits - 1)) <= int(codes.min()) and int(codes.max()) < 2 ** (grid.bits - 1)
    for e in range(E):
        alone = gptq(w_EMN[e], grid, inputs=inputs[e], order=order, block=24)
        assert float((alone.codes_MN == made[e].codes_MN).double().mean()) > 0.995
        assert torch.equal(nearest[e].dequantized(), round_to_nearest(w_EMN[e], grid).dequantized())
        assert error(w_EMN[e], made[e].dequantized(), inputs[e]) <= error(w_EMN[e], nearest[e].dequantized(), inputs[e])
    half = (nearest.scale_MG / 2).repeat_interleave(N // grid.groups(N), -1)
    assert ((nearest.dequantized() - w_EMN).abs() <= half * (1 if grid.symmetric else 2) * 1.001).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (40, 8), (8, 136)])
def test_any_shape_will_do_and_any_batch_in_front(rows: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(3)
    w_ABMN, x_ABTN = (torch.randn(2, 3, count, columns, generator=draw) for count in (rows, 50))
    for order in (False, True):
        made = gptq(w_ABMN, Grid(4, False, 8), inputs=x_ABTN, order=order)
        alone = gptq(w_ABMN[1, 2], Grid(4, False, 8), moment=second_moment(x_ABTN[1, 2]), order=order)
        assert torch.equal(made[1][2].dequantized(), alone.dequantized()) and made.codes_MN.shape == w_ABMN.shape
    assert round_to_nearest(w_ABMN, Grid(2, False, 4)).dequantized().shape == w_ABMN.shape
    for pattern in PATTERNS:
        made_ABMN = sparsegpt(w_ABMN.mT.contiguous().mT, pattern, inputs=x_ABTN, block=12)
        assert torch.equal(made_ABMN[0, 1], sparsegpt(w_ABMN[0, 1], pattern, moment=second_moment(x_ABTN[0, 1]), block=12))
        assert magnitude(w_ABMN, pattern).shape == wanda(w_ABMN, pattern, inputs=x_ABTN).shape == w_ABMN.shape


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_pattern_holds(pattern: str) -> None:
    w_EMN, inputs = batch()
    parsed = Pattern.parse(pattern)
    assert str(parsed) == pattern and Pattern.parse(parsed) is parsed
    stay = parsed.keep / parsed.of if parsed.of else 1 - parsed.ratio
    masks = [magnitude(w_EMN, pattern), wanda(w_EMN, pattern, inputs=inputs), sparsegpt(w_EMN, pattern, inputs=inputs) != 0]
    for stays_EMN in masks:
        if parsed.of:
            assert (stays_EMN.unflatten(-1, (-1, parsed.of)).sum(-1) == parsed.keep).all()
        assert float(stays_EMN.double().mean()) == pytest.approx(stay, abs=0.001)
    assert (masks[1].sum(-1) == N * stay).all()
    inputs_error = [sum(error(w_EMN[e], w_EMN[e] * m[e], inputs[e]) for e in range(E)) for m in masks[:2]]
    made_EMN = sparsegpt(w_EMN, pattern, inputs=inputs)
    best = sum(error(w_EMN[e], made_EMN[e], inputs[e]) for e in range(E))
    assert best < inputs_error[1] < inputs_error[0]


def test_of_equal_weights_exactly_so_many_go_and_the_first_go_first() -> None:
    for drops in (lowest(torch.ones(3, 9), 4), smallest_of_few(torch.ones(9, 3), 4).mT):
        assert torch.equal(drops, (torch.arange(9) < 4).expand(3, 9))
    assert not lowest(torch.rand(2, 5), 0).any()
    score_KX = torch.randint(0, 4, (8, 300), generator=torch.Generator().manual_seed(1)).float()
    known_KX = torch.zeros_like(score_KX, dtype=torch.bool).scatter_(0, score_KX.sort(dim=0, stable=True).indices[:4], True)
    assert torch.equal(smallest_of_few(score_KX, 4), known_KX) and torch.equal(lowest(score_KX.mT, 4).mT, known_KX)


def test_magnitude_keeps_the_largest_and_drops_the_smallest() -> None:
    """The authors' code of "Demystifying the Compression of MoE" has it the other way round."""
    w_MN = torch.tensor([[0.1, -3.0, 0.2, 2.0], [4.0, -0.3, 0.0, -5.0]])
    assert (
        magnitude(w_MN, "0.5").tolist()
        == magnitude(w_MN, "2:4").tolist()
        == [[False, True, False, True], [True, False, False, True]]
    )


@pytest.mark.parametrize("silent", ["moment", "inputs"])
def test_an_expert_without_tokens_is_refused_with_what_to_do_and_never_zeroed(silent: str) -> None:
    w_EMN, inputs = batch()
    inputs[1] = inputs[1][:0]
    given = {"moment": moments(inputs)} if silent == "moment" else {"inputs": inputs}
    for work, instead in (
        (lambda: wanda(w_EMN, "2:4", **given), "magnitude"),
        (lambda: sparsegpt(w_EMN, "2:4", **given), "magnitude"),
        (lambda: gptq(w_EMN, Grid(group=0), **given), "round_to_nearest"),
    ):
        with pytest.raises(ValueError, match=rf"{silent} of matrix 1: all zero.* use {instead}\(\)") as caught:
            work()
        assert "\n" not in str(caught.value)
    assert magnitude(w_EMN, "2:4")[1].any() and round_to_nearest(w_EMN, Grid(group=0))[1].codes_MN.any()


@pytest.mark.parametrize("order", [False, True])
def test_an_input_never_seen_is_rounded_to_nearest_and_not_zeroed(order: bool) -> None:
    w_EMN, inputs = batch()
    for x_TN in inputs:
        x_TN[:, [5, 40]] = 0
    grid = Grid(4, True, 0)
    made, nearest = gptq(w_EMN, grid, inputs=inputs, order=order), round_to_nearest(w_EMN, grid)
    assert torch.equal(made.codes_MN[..., [5, 40]], nearest.codes_MN[..., [5, 40]]) and made.codes_MN[..., 5].any()
    pruned_EMN = sparsegpt(w_EMN, "2:4", inputs=inputs)
    stays_EM2 = pruned_EMN[..., [5, 40]] != 0
    torch.testing.assert_close(pruned_EMN[..., [5, 40]][stays_EM2], w_EMN[..., [5, 40]][stays_EM2])
    few = gptq(w_EMN, grid, inputs=[x[:3] for x in inputs])  # far fewer tokens than inputs: singular, but damped
    assert few.dequantized().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_scales_are_such_as_the_checkpoint_can_hold(dtype: torch.dtype) -> None:
    w_EMN, inputs = batch()
    for q in (
        gptq(w_EMN, Grid(group=16), inputs=inputs, scale_dtype=dtype),
        round_to_nearest(w_EMN, Grid(group=16), scale_dtype=dtype),
    ):
        assert q.scale_MG.dtype == dtype
        torch.testing.assert_close(q.dequantized(), q.codes_MN * q.scale_MG.float().repeat_interleave(16, -1), rtol=0.0, atol=0.0)
    tiny = round_to_nearest(torch.full((2, 16), 1e-12), Grid(group=16), scale_dtype=dtype)
    assert (
        tiny.dequantized().isfinite().all()
        and not round_to_nearest(torch.zeros(2, 16), Grid(group=0, symmetric=False)).dequantized().any()
    )


def test_group_scales_follow_the_weights_as_they_are_when_their_block_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the papers' loop, whatever divides what; with order they follow the weights given, in any unit of the moment."""
    w_EMN, inputs = batch()
    for group, block in ((16, 24), (32, 16), (8, 64), (64, 16)):
        made = gptq(w_EMN, Grid(4, True, group), inputs=inputs, block=block)
        monkeypatch.setattr(slimming, "GRID", made.grid)
        monkeypatch.setattr(slimming, "BLOCK", block)
        known_EMN = torch.stack([slimming.reference_gptq(w, s.float()) for w, s in zip(w_EMN, moments(inputs), strict=True)])
        assert float(torch.isclose(made.dequantized(), known_EMN, rtol=1e-3, atol=1e-4).double().mean()) > 0.995
    static = gptq(w_EMN, Grid(4, False, 16), inputs=inputs, order=True)
    torch.testing.assert_close(static.scale_MG, round_to_nearest(w_EMN, Grid(4, False, 16)).scale_MG)
    for unit in (1e-12, 1e12):
        other = gptq(w_EMN, Grid(4, False, 16), moment=moments(inputs) * unit, order=True)
        assert float((other.codes_MN == static.codes_MN).double().mean()) > 0.995
        assert torch.equal(other[0].scale_MG, static[0].scale_MG)


def test_memory_does_not_grow_with_the_number_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU as many matrices are taken at once as the budget allows; the result is the same."""
    grid = Grid(4, True, 128)
    mixtral = gptq_memory(14336, 4096, grid=grid)
    assert 4 * 14336 * 4096 < mixtral < 2**30 and sparsegpt_memory(14336, 4096) < 2**30
    assert gptq_memory(14336, 4096, 3, grid=grid) <= 3 * mixtral
    for at_once in (0, -1):
        with pytest.raises(ValueError, match=f"at_once={at_once} must be at least 1"):
            sparsegpt(torch.randn(2, 4, 8), "2:4", inputs=torch.randn(2, 9, 8), at_once=at_once)
    monkeypatch.setattr("moeflow.methods.slim.sparsegpt.INNER", 5)
    w_EMN, inputs = batch()
    made_EMN = sparsegpt(w_EMN, "2:4", inputs=inputs)
    monkeypatch.undo()
    torch.testing.assert_close(made_EMN, sparsegpt(w_EMN, "2:4", inputs=inputs), rtol=1e-4, atol=1e-4)
