"""Pruned and rounded matrices are those of the papers' released code; what the code got wrong is a promise here."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import slimming
from moeflow.methods.slim import gptq, masks, sparsegpt
from moeflow.methods.slim.grid import BITS, Grid
from moeflow.methods.slim.masks import lowest, smallest_of_few
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.slim.pattern import Pattern
from tests.running import GOLDEN
from tests.slimmed import compensated, moments, nearest, on

E, M, N = 3, 24, 64
GRIDS = [Grid(bits, symmetric, group) for bits in BITS for symmetric in (True, False) for group in (0, 16)]
PATTERNS = ["0.5", "2:4", "4:8", "1:4"]


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """Weights [E, M, N] of as many experts, and inputs, some directions stronger, of a different number of tokens each."""
    draw = torch.Generator().manual_seed(0)
    mix_NN = torch.randn(N, N, generator=draw) * torch.logspace(0, -1.5, N)
    w_EMN = torch.randn(E, M, N, generator=draw).to(dtype)
    return w_EMN, [torch.randn(150 + 40 * e, N, generator=draw) @ mix_NN for e in range(E)]


def magnitude(w_MN: Tensor, pattern: str) -> Tensor:
    return masks.magnitude(w_MN, None, Slimming("magnitude", pattern=pattern))


def wanda(w_MN: Tensor, pattern: str, inputs: Tensor | list[Tensor]) -> Tensor:
    return masks.wanda(w_MN, moments(inputs), Slimming("wanda", pattern=pattern))


def pruned(w_MN: Tensor, pattern: str, inputs: Tensor | list[Tensor], **more: int) -> Tensor:
    return sparsegpt.sparsegpt(w_MN, moments(inputs), Slimming("sparsegpt", pattern=pattern, **more))


def error(w_MN: Tensor, other_MN: Tensor, x_TN: Tensor) -> float:
    return float(torch.linalg.vector_norm((other_MN - w_MN).double() @ x_TN.reshape(-1, x_TN.shape[-1]).double().mT))


@pytest.fixture(scope="module")
def known() -> dict[str, Tensor]:
    return load_file(GOLDEN / "slim-3" / "linear.safetensors")


@pytest.mark.parametrize(("name", "pattern"), [("wanda_50", "0.5"), ("wanda_2of4", "2:4"), ("wanda_4of8", "4:8")])
def test_wanda_keeps_exactly_what_the_authors_code_keeps(known: dict[str, Tensor], name: str, pattern: str) -> None:
    assert torch.equal(wanda(known["weight"], pattern, known["inputs"].flatten(0, 1)), known[name])


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("sparsegpt_50_block32", "0.5", {}),
        ("sparsegpt_2of4_block32", "2:4", {}),
        ("gptq_4bit_sym_channel", Grid(4, True, 0), {}),
        ("gptq_3bit_sym_channel", Grid(3, True, 0), {}),
        ("gptq_4bit_asym_group32", Grid(4, False, 32), {}),
        ("gptq_4bit_sym_channel_actorder", Grid(4, True, 0), {"activation_order": True}),
    ],
)
def test_sparsegpt_and_gptq_make_the_weights_of_the_authors_code(
    known: dict[str, Tensor], name: str, method: str | Grid, options: dict[str, bool]
) -> None:
    w_MN, x_TN = known["weight"], known["inputs"].flatten(0, 1)
    if isinstance(method, Grid):
        made_MN = compensated(w_MN, method, x_TN, columns=32, **options).dequantized()
    else:
        made_MN = pruned(w_MN, method, x_TN, columns=32)
    assert float(torch.isclose(made_MN, known[name], rtol=1e-4, atol=1e-5).double().mean()) >= 0.995
    assert error(w_MN, made_MN, x_TN) == pytest.approx(error(w_MN, known[name], x_TN), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_batch_is_pruned_as_its_matrices_one_after_the_other(
    pattern: str, at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    w_EMN, inputs = batch(dtype)
    before = w_EMN.clone()
    with monkeypatch.context() as patch:
        bytes_of_one = sparsegpt.memory(M, N, Slimming("sparsegpt", columns=24))
        patch.setitem(sparsegpt.BUDGET, "cpu", at_once * bytes_of_one)
        made_EMN = pruned(w_EMN, pattern, inputs, columns=24)
    assert torch.equal(w_EMN, before) and made_EMN.dtype == dtype
    kept_EMN, large_EMN = wanda(w_EMN, pattern, inputs), magnitude(w_EMN, pattern)
    for e in range(E):
        alone_MN = pruned(w_EMN[e], pattern, inputs[e], columns=24)
        assert torch.equal(made_EMN[e] == 0, alone_MN == 0)
        torch.testing.assert_close(made_EMN[e], alone_MN, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)
        assert torch.equal(kept_EMN[e], wanda(w_EMN[e], pattern, inputs[e]))
        assert torch.equal(large_EMN[e], magnitude(w_EMN[e], pattern))


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("order", [False, True], ids=["as they come", "by energy"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_batch_is_rounded_as_its_matrices_one_after_the_other(
    grid: Grid, order: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes fit their bits, and the outputs are nearer than where each weight is rounded to its nearest."""
    w_EMN, inputs = batch()
    how = on(grid, columns=24, activation_order=order)
    with monkeypatch.context() as patch:
        patch.setitem(sparsegpt.BUDGET, "cpu", at_once * gptq.memory(M, N, how))
        made = gptq.gptq(w_EMN, moments(inputs), how)
    plain = nearest(w_EMN, grid)
    for q in (made, plain):
        assert q.codes_MN.dtype == torch.int8 and q.codes_MN.shape == w_EMN.shape and (q.zero_MG is None) == grid.symmetric
        assert q.scale_MG.shape == (E, M, grid.groups(N))
        for codes in (q.codes_MN, q.zero_MG) if q.zero_MG is not None else (q.codes_MN,):
            assert -(2 ** (grid.bits - 1)) <= int(codes.min()) and int(codes.max()) < 2 ** (grid.bits - 1)
    for e in range(E):
        alone = gptq.gptq(w_EMN[e], moments(inputs[e]), how)
        assert float((alone.codes_MN == made[e].codes_MN).double().mean()) > 0.995
        assert torch.equal(plain[e].dequantized(), nearest(w_EMN[e], grid).dequantized())
        assert error(w_EMN[e], made[e].dequantized(), inputs[e]) <= error(w_EMN[e], plain[e].dequantized(), inputs[e])
    half = (plain.scale_MG / 2).repeat_interleave(N // grid.groups(N), -1)
    assert ((plain.dequantized() - w_EMN).abs() <= half * (1 if grid.symmetric else 2) * 1.001).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (40, 8), (8, 136)])
def test_any_shape_will_do_and_any_batch_in_front(rows: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(3)
    w_ABMN, x_ABTN = (torch.randn(2, 3, count, columns, generator=draw) for count in (rows, 50))
    for order in (False, True):
        made = compensated(w_ABMN, Grid(4, False, 8), x_ABTN, activation_order=order)
        alone = compensated(w_ABMN[1, 2], Grid(4, False, 8), x_ABTN[1, 2], activation_order=order)
        assert torch.equal(made[1][2].dequantized(), alone.dequantized()) and made.codes_MN.shape == w_ABMN.shape
    assert nearest(w_ABMN, Grid(2, False, 4)).dequantized().shape == w_ABMN.shape
    for pattern in PATTERNS:
        made_ABMN = pruned(w_ABMN.mT.contiguous().mT, pattern, x_ABTN, columns=12)
        assert torch.equal(made_ABMN[0, 1], pruned(w_ABMN[0, 1], pattern, x_ABTN[0, 1], columns=12))
        assert magnitude(w_ABMN, pattern).shape == wanda(w_ABMN, pattern, x_ABTN).shape == w_ABMN.shape


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_pattern_holds(pattern: str) -> None:
    w_EMN, inputs = batch()
    parsed = Pattern.parse(pattern)
    stay = parsed.keep / parsed.of if parsed.of else 1 - parsed.ratio
    made = [magnitude(w_EMN, pattern), wanda(w_EMN, pattern, inputs), pruned(w_EMN, pattern, inputs)]
    for stays_EMN in [made_EMN != 0 for made_EMN in made]:
        if parsed.of:
            assert (stays_EMN.unflatten(-1, (-1, parsed.of)).sum(-1) == parsed.keep).all()
        assert float(stays_EMN.double().mean()) == pytest.approx(stay, abs=0.001)
    assert ((made[1] != 0).sum(-1) == N * stay).all()
    by_magnitude, by_wanda, best = (sum(error(w_EMN[e], m[e], inputs[e]) for e in range(E)) for m in made)
    assert best < by_wanda < by_magnitude


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
    for pattern in ("0.5", "2:4"):
        assert magnitude(w_MN, pattern).tolist() == [[0, -3, 0, 2], [4, 0, 0, -5]]


def test_an_expert_without_tokens_is_refused_with_what_to_do_and_never_zeroed() -> None:
    w_EMN, inputs = batch()
    inputs[1] = inputs[1][:0]
    for work, instead in (
        (lambda: wanda(w_EMN, "2:4", inputs), "magnitude"),
        (lambda: pruned(w_EMN, "2:4", inputs), "magnitude"),
        (lambda: compensated(w_EMN, Grid(group=0), inputs), "round_to_nearest"),
    ):
        with pytest.raises(ValueError, match=rf"moment of matrix 1 is zero: no tokens were seen.* take {instead}\(\)") as caught:
            work()
        assert "\n" not in str(caught.value)
    assert magnitude(w_EMN, "2:4")[1].any() and nearest(w_EMN, Grid(group=0))[1].codes_MN.any()


@pytest.mark.parametrize("order", [False, True])
def test_an_input_never_seen_is_rounded_to_nearest_and_not_zeroed(order: bool) -> None:
    w_EMN, inputs = batch()
    for x_TN in inputs:
        x_TN[:, [5, 40]] = 0
    grid = Grid(4, True, 0)
    made, plain = compensated(w_EMN, grid, inputs, activation_order=order), nearest(w_EMN, grid)
    assert torch.equal(made.codes_MN[..., [5, 40]], plain.codes_MN[..., [5, 40]]) and made.codes_MN[..., 5].any()
    pruned_EMN = pruned(w_EMN, "2:4", inputs)
    stays_EM2 = pruned_EMN[..., [5, 40]] != 0
    torch.testing.assert_close(pruned_EMN[..., [5, 40]][stays_EM2], w_EMN[..., [5, 40]][stays_EM2])
    few = compensated(w_EMN, grid, [x[:3] for x in inputs])  # far fewer tokens than inputs: singular, but damped
    assert few.dequantized().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_scales_are_such_as_the_checkpoint_can_hold(dtype: torch.dtype) -> None:
    w_EMN, inputs = batch()
    for q in (compensated(w_EMN, Grid(group=16), inputs, dtype), nearest(w_EMN, Grid(group=16), dtype)):
        assert q.scale_MG.dtype == dtype
        torch.testing.assert_close(q.dequantized(), q.codes_MN * q.scale_MG.float().repeat_interleave(16, -1), rtol=0.0, atol=0.0)
    tiny = nearest(torch.full((2, 16), 1e-12), Grid(group=16), dtype)
    assert (
        tiny.dequantized().isfinite().all() and not nearest(torch.zeros(2, 16), Grid(group=0, symmetric=False)).dequantized().any()
    )


def test_group_scales_follow_the_weights_as_they_are_when_their_stripe_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the papers' loop, whatever divides what; by activation order they follow the original weights, in any unit."""
    w_EMN, inputs = batch()
    for group, columns in ((16, 24), (32, 16), (8, 64), (64, 16)):
        made = compensated(w_EMN, Grid(4, True, group), inputs, columns=columns)
        monkeypatch.setattr(slimming, "GRID", made.grid)
        monkeypatch.setattr(slimming, "COLUMNS", columns)
        known_EMN = torch.stack([slimming.reference_gptq(w, s.float()) for w, s in zip(w_EMN, moments(inputs), strict=True)])
        assert float(torch.isclose(made.dequantized(), known_EMN, rtol=1e-3, atol=1e-4).double().mean()) > 0.995
    how = on(Grid(4, False, 16), activation_order=True)
    static = gptq.gptq(w_EMN, moments(inputs), how)
    torch.testing.assert_close(static.scale_MG, nearest(w_EMN, how.grid).scale_MG)
    for unit in (1e-12, 1e12):
        other = gptq.gptq(w_EMN, moments(inputs) * unit, how)
        assert float((other.codes_MN == static.codes_MN).double().mean()) > 0.995
        assert torch.equal(other[0].scale_MG, static[0].scale_MG)


def test_memory_does_not_grow_with_the_number_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU as many matrices are taken at once as the budget allows; the result is the same."""
    mixtral = gptq.memory(14336, 4096, Slimming("gptq"))
    assert 4 * 14336 * 4096 < mixtral < 2**30 and sparsegpt.memory(14336, 4096, Slimming("sparsegpt")) < 2**30
    monkeypatch.setattr(sparsegpt, "INNER", 5)
    w_EMN, inputs = batch()
    made_EMN = pruned(w_EMN, "2:4", inputs)
    monkeypatch.undo()
    torch.testing.assert_close(made_EMN, pruned(w_EMN, "2:4", inputs), rtol=1e-4, atol=1e-4)
