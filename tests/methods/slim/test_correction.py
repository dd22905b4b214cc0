"""A matrix that is moved before it is slimmed makes up for what was lost before it, and for nothing else."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.recipes import compare, unified
from moeflow.methods.recipes.sequence import in_sequence
from moeflow.methods.slim import experts
from moeflow.methods.slim.correction import Seen, Wanted, corrected
from moeflow.methods.slim.methods import METHODS, Share, Slimming
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import Folder, file_beside, file_of
from moeflow.model.moe import whole
from moeflow.model.observe import is_sum
from moeflow.model.passes import inputs, through
from moeflow.model.spec import Recording
from moeflow.model.stream import HIDDEN
from moeflow.step import Part, Step
from tests import running, tiny
from tests.methods.test_other_families import Layer
from tests.model.test_other_families import some
from tests.test_small_model import HELD_OUT, TRAINED_ON

ABLE = [name for name, row in METHODS.items() if "target" in row.takes]


def wanted(x_TN: Tensor, lacks_TM: Tensor) -> Wanted:
    return Wanted(len(x_TN), lambda rows: Seen(x_TN[rows], x_TN[rows], lacks_TM[rows]))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_matrix_moves_to_what_it_should_give() -> None:
    """More than `INNER_AT_ONCE` tokens, so that sums are made of several products."""
    x_TN, w_MN, other_MN = random(5000, 12), random(7, 12, seed=1), random(7, 12, seed=2)
    made = corrected(w_MN, wanted(x_TN, x_TN @ (other_MN - w_MN).mT))
    for matrix_MN, least, most in ((w_MN, 0.5, 9.0), (made.weight_MN, 0.0, 0.03), (other_MN, -1e-6, 1e-6)):
        misses = (x_TN @ (matrix_MN - other_MN).mT).square().sum() / (x_TN @ w_MN.mT).square().sum()
        assert least < made.missed(matrix_MN) < most and made.missed(matrix_MN) == pytest.approx(float(misses), abs=1e-5)
    before_TN = x_TN + 0.2 * x_TN @ random(12, 12, seed=3)  # a matrix that sees other inputs gives what it gave
    made = corrected(w_MN, Wanted(len(x_TN), lambda rows: Seen(x_TN[rows], before_TN[rows])))
    assert (x_TN @ made.weight_MN.mT - before_TN @ w_MN.mT).norm() < 0.2 * ((x_TN - before_TN) @ w_MN.mT).norm()


@pytest.mark.parametrize("tokens", [0, 1, 2, 9, 60])
def test_noise_moves_nothing(tokens: int) -> None:
    """Fewer tokens than inputs would let least squares repeat any noise."""
    x_TN, w_MN = random(tokens, 30), random(7, 30, seed=1)
    made = corrected(w_MN, wanted(x_TN, random(tokens, 7, seed=2)))
    assert torch.equal(made.weight_MN, w_MN)


def test_inputs_that_are_zero_move_nothing() -> None:
    assert torch.equal(corrected(random(3, 4), wanted(torch.zeros(8, 4), random(8, 3))).weight_MN, random(3, 4))


@pytest.fixture(params=some("gpt_oss", "nemotron_h", "llama4_text", "ernie4_5_moe", "qwen3_next"))
def layer(request: pytest.FixtureRequest, tmp_path: Path) -> Layer:
    return Layer(request.param, tmp_path)


def rewritten(layer: Layer, lost_TD: Tensor | None, **how: Any) -> Tensor:
    """What the layer gives for its tokens after it was slimmed, where so much of its residual was lost before it."""
    beside, shard = layer.folder / "beside", layer.shard / "recorded.safetensors"
    save_file({"x_RD": layer.x_TD, "beside_RD": 5 * random(*layer.x_TD.shape, seed=7)}, shard)
    folders = []
    if lost_TD is not None:
        beside.mkdir(exist_ok=True)
        save_file({"beside_RD": Tensors(shard)["beside_RD"] + lost_TD}, beside / "recorded.safetensors")
        folders = [Folder(beside)]
    options = Slimming(inputs="sequential", packed=False, group=8, pattern="0.2", **how)
    experts.rewrite(
        layer.context, layer.config, Folder(layer.before), [Folder(layer.shard)], folders, options,
        layer=layer.number, share=Share(), dtype="float32",
    )  # fmt: skip
    return layer.moe(layer.context.out)(layer.x_TD)


@torch.inference_mode()
@pytest.mark.parametrize("method, bits", [("gptq", 3), ("gptq", 8), ("wanda", 4), ("sparsegpt", 4)])
def test_a_block_makes_up_for_what_was_lost_before_it(layer: Layer, method: str, bits: int) -> None:
    """Whatever its router's weights are, and whether they multiply an expert's inputs or outputs."""
    layer.x_TD = random(2000, layer.x_TD.shape[1], seed=3)
    moe = layer.moe()
    others = [e.with_matrices([*e.matrices[:-1], whole(e.matrices[-1]).roll(1, 0)]) for e in moe.experts]
    goal_TD = replace(moe, experts=tuple(others))(layer.x_TD)
    lost_TD = goal_TD - moe(layer.x_TD)

    def far(target: str) -> float:
        return float((rewritten(layer, lost_TD, method=method, bits=bits, target=target) - goal_TD).norm() / lost_TD.norm())

    matrix, expert, model = map(far, ("matrix", "expert", "model"))
    assert model < min(0.93 * expert, 0.93 * matrix), (matrix, expert, model)


@torch.inference_mode()
@pytest.mark.parametrize("method", ABLE)
def test_an_expert_makes_up_for_its_own_matrices(method: str, tmp_path: Path) -> None:
    layer = Layer("ernie4_5_moe", tmp_path)
    layer.x_TD = random(3000, layer.x_TD.shape[1])
    whole_TD = layer.moe()(layer.x_TD)
    matrix, expert = (
        float((rewritten(layer, None, method=method, bits=3, target=t) - whole_TD).norm()) for t in ("matrix", "expert")
    )
    assert expert < 0.97 * matrix
    assert torch.equal(
        rewritten(layer, None, method=method, bits=3, target="model"),
        rewritten(layer, None, method=method, bits=3, target="expert"),
    ), "nothing of the original is known"


def alone(file: Path, folder: Path) -> Folder:
    """A folder with this file alone, as a step sees a part of another."""
    folder.mkdir()
    shutil.copy(file, folder / "recorded.safetensors")
    return Folder(folder)


def test_the_original_and_the_rewritten_model_are_compared_on_the_same_tokens(family: Path, tmp_path: Path) -> None:
    """Where the model stays as it is nothing is lost, whatever is recorded and however shards are divided."""
    model, store = running.model_in(family), running.store_in(tmp_path)
    matrix = data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16))
    for record in (None, 72, 20):
        calibration = calibrate.run(model, matrix, Pass(shard=8, stage=2, record=record), beside=2)
        again = calibrate.run(model, matrix, Pass(shard=2, stage=2, record=record))
        seen: dict[int, tuple[Part, ...]] = {}

        def kept(i: int, file: Step, recorded: tuple[Part, ...], seen: dict[int, tuple[Part, ...]] = seen) -> Step:
            seen[i] = recorded
            return file

        in_sequence(again, kept, statistics=False, beside=True)
        steps = [p.step for each in (*seen.values(), *calibration.beside.values()) for p in each]
        running.run(store, *steps)
        for i in model.moe_layers:
            now, original = (
                [alone(store.artifact(p.step.key).file(name), tmp_path / f"{record}-{i}-{n}-{name}") for n, p in enumerate(parts)]
                for parts, name in ((seen[i], file_of(i)), (calibration.beside[i], file_beside(i)))
            )
            lost_TD = experts.lost_before(now, original)
            assert lost_TD is not None and len(lost_TD) == (128 if record is None else -(-record // 4) * 4)
            assert lost_TD.abs().max() < 1e-5


def test_a_layer_that_scales_what_it_adds_is_not_compared(tmp_path: Path) -> None:
    folder = Layer("granitemoe", tmp_path)
    states = tmp_path / "states"
    save_file({HIDDEN: random(2, 16, folder.config["hidden_size"])}, states)
    how: dict[str, Any] = {"batch": 0, "dtype": "float32", "progress": lambda *_: None}
    for multiplier, rows in ((1.0, 32), (0.2, 0)):
        config = dict(folder.config) | {"residual_multiplier": multiplier}
        recording = Recording(32, beside=(16, 16))
        through(config, states, [(folder.number, Folder(folder.before))], tmp_path / "behind", count=1, recording=recording, **how)
        assert len(Tensors(tmp_path / file_beside(folder.number))["beside_RD"]) == rows
        inputs(config, states, folder.number, Folder(folder.before), tmp_path / "in", recorded=32, beside=True, **how)
        assert len(Tensors(tmp_path / "in")["beside_RD"]) == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_is_known_within_the_rounding_of_its_precision(dtype: torch.dtype) -> None:
    a_TD, b_TD = 30 * random(50, 40).to(dtype), random(50, 40, seed=1).to(dtype)
    assert is_sum(a_TD + b_TD, a_TD, b_TD)
    assert not is_sum(a_TD + 1.5 * b_TD, a_TD, b_TD)


def test_what_cannot_be_is_refused_with_what_can(tmp_path: Path) -> None:
    for how in (
        {"method": "gptq"},
        {"method": "awq", "inputs": "sequential"},
        {"method": "round_to_nearest", "inputs": "sequential"},
    ):
        with pytest.raises(ValueError, match="needs inputs=sequential and one of wanda, sparsegpt, gptq"):
            Slimming(target="expert", **how)
    model = running.model_in(tiny.write("mixtral", tmp_path / "model"))
    calibration = calibrate.run(model, data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16)))
    with pytest.raises(ValueError, match="calibrate with beside"):
        unified.slim(calibration, Slimming("gptq", group=8, inputs="sequential", target="model"))


@torch.inference_mode()
def test_a_trained_model_loses_less(tmp_path: Path) -> None:
    """On text that neither its training nor the calibration has seen; by a recipe, whose calibration follows from the options."""
    store, model = running.store_in(tmp_path), running.model_in(running.SMALL)
    matrix = data.tokens(TRAINED_ON, model, Sample(64, 128))
    how = Slimming("gptq", bits=3, group=32, activation_order=True, inputs="sequential")

    def divergence(target: Any) -> float:
        made = unified.compress(model, matrix, Pass(shard=32, stage=2), slim=replace(how, target=target)).model
        reports = compare.reports(model, made, compare.HeldOut(HELD_OUT.spec, 16, 128, bos=False), Pass())
        done = checkpoint.checkpoint_of(made).reporting(*(r for r in reports if r.name == "evaluate.quality"))
        running.run(store, *done.reports)
        (found,) = (row for name, row in running.reports(store, done).items() if name.startswith("KL to the original"))
        return float(found["compressed"])

    far = {target: divergence(target) for target in ("matrix", "expert", "model")}
    assert far["model"] < 0.97 * far["expert"] < 0.94 * far["matrix"], far
