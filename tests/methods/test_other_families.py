"""Methods over experts of other forms: without a gate, with biases, with weighted inputs. They work, or say why not."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moeflow.arch import ARCH, Family
from moeflow.arch.found import Found
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.calibrate.chains import Alternatives, Forks
from moeflow.methods.data import steps as data
from moeflow.methods.decompose import factoring
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.fewer_active import steps as fewer_active
from moeflow.methods.finetune import trained
from moeflow.methods.finetune.recipe import Recipe
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.moments import layer_moments
from moeflow.methods.scores.functions import aimer
from moeflow.methods.slim import experts as slim
from moeflow.methods.slim import steps as slim_steps
from moeflow.methods.slim.methods import Share, Slimming
from moeflow.model import passes
from moeflow.model.checkpoint import Tensors, read_moe
from moeflow.model.formats import format_of
from moeflow.model.layout import LAYER, Folder, experts_in, headers, names_without_experts, read_config
from moeflow.model.moe import MoELayer
from moeflow.model.passes import norm_offset
from moeflow.step import upstream
from tests import normal, running
from tests.model.test_other_families import some


class Layer:
    """A tiny checkpoint, one of its layers, and tokens that were recorded there."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = normal.write(name, folder / "model")
        self.config = read_config(Folder(self.folder))
        self.family = Family.of(self.config)
        self.number = self.family.moe_layers[-1]
        self.x_TD = torch.randn(120, self.config["hidden_size"], generator=torch.Generator().manual_seed(0))
        self.before, self.shard = folder / "before", folder / "shard"
        for out in (self.before, self.shard, folder / "out"):
            out.mkdir()
        tensors = Tensors(self.folder)
        here = {n: t for n, t in tensors.items() if n.startswith(self.family.prefix(self.number))}
        save_file(here, self.before / LAYER)
        save_file({"x_RD": self.x_TD}, self.shard / "recorded.safetensors")
        self.context: Any = SimpleNamespace(
            out=folder / "out", progress=lambda *_: None, note=lambda *_: None, link=lambda *_: None
        )

    def moe(self, folder: Path | None = None) -> MoELayer:
        return read_moe(Tensors(folder or self.before), self.config, self.number)

    def apart(self) -> float:
        """How far the rewritten layer's output is from the original's, relative to its norm."""
        whole_TD, now_TD = self.moe()(self.x_TD), self.moe(self.context.out)(self.x_TD)
        return float((now_TD - whole_TD).norm() / whole_TD.norm())


@pytest.fixture(params=some("gpt_oss", "nemotron_h", "llama4_text", "ernie4_5_moe"))
def layer(request: pytest.FixtureRequest, tmp_path: Path) -> Layer:
    return Layer(request.param, tmp_path)


@torch.inference_mode()
def test_moments_are_those_of_what_each_expert_sees(layer: Layer) -> None:
    moe, x_TD = layer.moe(), layer.x_TD
    logits_TE = moe.logits(x_TD)
    weights_TE = moe.weights(x_TD)
    for e, moments in enumerate(layer_moments(moe, x_TD)):
        token = weights_TE[:, e].nonzero().squeeze(1)
        inputs_TD = moe.expert_input(x_TD[token], logits_TE[token], e) * weights_TE[token, e, None]
        torch.testing.assert_close(moments["up"]["input_moment_NN"], (inputs_TD.mT @ inputs_TD).double(), rtol=1e-4, atol=1e-4)
    assert aimer(moe, {}, 0).isfinite().all()


@pytest.mark.parametrize("method", ["gptq", "wanda", "round_to_nearest"])
def test_experts_of_any_form_are_slimmed(layer: Layer, method: str) -> None:
    how = Slimming(method, bits=8, group=8, packed=False, pattern="0.05", shared=bool(layer.family.arch.shared))
    report = slim.rewrite(
        layer.context, layer.config, Folder(layer.before), [Folder(layer.shard)], [], how, layer=layer.number, share=Share(),
        dtype="float32",
    )  # fmt: skip
    assert report is not None and set(report[0]["lost"]) == set(layer.family.matrices)
    assert 0 < layer.apart() < 0.1


def test_experts_of_any_form_are_factored(layer: Layer) -> None:
    how, before, seen = Decomposition(least=1), Folder(layer.before), [Folder(layer.shard)]
    every = range(experts_in(headers(before), layer.config, layer.number))
    spectra = factoring.spectra(layer.context, layer.config, before, seen, how, layer=layer.number, experts=every, dtype="float32")
    assert set(spectra.energies) == set(layer.family.matrices)
    factoring.rewrite(
        layer.context, layer.config, before, seen, how, layer=layer.number, ranks=dict.fromkeys(("gate", "up", "down"), 22),
        experts=every, dtype="float32",
    )  # fmt: skip
    assert layer.moe(layer.context.out).experts[0].biases == () or layer.family.arch.expert_biases
    assert 0 < layer.apart() < 0.3


@pytest.mark.parametrize(
    "name, reason", [("gpt_oss", "biases and the activation"), ("nemotron_h", "no gate"), ("llama4_text", "weig")]
)
def test_scaling_is_refused_where_experts_do_not_scale(name: str, reason: str) -> None:
    family = Family.of({ARCH: normal.FAMILIES[name][0].to_json()})
    with pytest.raises(ValueError, match=reason):
        slim_steps.check_scalable(family, Slimming("awq", bits=4, group=8))


def test_a_norm_that_feeds_more_than_its_block_stays_and_is_not_scaled() -> None:
    """In Granite 4 a dense network reads it, too."""
    arch = replace(normal.FAMILIES["granitemoe"][0], norm_feeds_more=True, moe=(0,))
    config = {ARCH: arch.to_json(), "num_hidden_layers": 1}
    with pytest.raises(ValueError, match="have no norm of their own, which awq cannot scale; take gptq instead"):
        slim_steps.check_scalable(Family.of(config), Slimming("awq", bits=4, group=8))
    others = ["shared_mlp.input_linear.weight", "post_attention_layernorm.weight"]
    names = [f"model.layers.0.{n}" for n in (*others, "block_sparse_moe.router.weight")]
    left = names_without_experts(names, config, 0, whole=True)
    assert left == names[:2] and format_of(dict.fromkeys(left, (1,)), config, 0).gone == "moe"


def test_experts_whose_inputs_are_weighed_are_not_skipped() -> None:
    family = Family.of({ARCH: normal.FAMILIES["llama4_text"][0].to_json(), "num_experts_per_tok": 2})
    with pytest.raises(ValueError, match="no skipped experts"):
        fewer_active.check(family, fewer_active.Skipping())


@torch.inference_mode()
def test_scaling_goes_into_a_norm_that_stores_its_difference_from_one(tmp_path: Path) -> None:
    layer = Layer("qwen3_next", tmp_path)
    how = Slimming("awq", bits=8, group=8, packed=False)
    slim.rewrite(
        layer.context, layer.config, Folder(layer.before), [Folder(layer.shard)], [], how, layer=layer.number, share=Share(),
        dtype="float32",
    )  # fmt: skip
    norm = layer.family.norm(layer.number) + "weight"
    before_D, after_D = (Tensors(folder)[norm] + 1 for folder in (layer.before, layer.context.out))
    router = layer.family.router(layer.number)
    before_ED, after_ED = (Tensors(folder)[router] for folder in (layer.before, layer.context.out))
    assert norm_offset(layer.config, layer.number) == 1.0 and not torch.equal(before_D, after_D)
    torch.testing.assert_close(before_ED * before_D, after_ED * after_D, rtol=1e-4, atol=1e-5)


def test_trained_experts_are_written_matrix_by_matrix(layer: Layer) -> None:
    """Whatever the form of the stacks in which transformers trains them."""
    tensors = Tensors(layer.before)
    module = passes.stream_of(layer.config, "float32").layer(tensors, layer.number)
    stem = f"{layer.family.arch.block}.experts."
    stacks = {f"{layer.family.prefix(layer.number)}{n}": p for n, p in module.named_parameters() if n.startswith(stem)}
    written = trained.tensors_of(stacks, tensors, layer.config, Recipe())
    assert written.keys() == {n for n in tensors if layer.family.of_expert(n, layer.number)}
    assert all(torch.equal(t, tensors[n]) for n, t in written.items())


def test_a_plan_counts_what_layers_hand_on_beside_hidden_states(tmp_path: Path) -> None:
    """The indices of a GLM-5, in the states of a pass and in those of a sweep."""
    folder, store = normal.write("glm_moe_dsa", tmp_path / "model"), running.store_in(tmp_path)
    model = running.model_in(folder, found=Found(normal.FAMILIES["glm_moe_dsa"][0]))
    matrix = data.tokens(running.matrix_of(tmp_path), model, Sample(8, 16))
    calibration = calibrate.run(model, matrix, Pass(batch=4, stage=1))
    curves = calibrate.curves(calibration, {1: Alternatives(Forks("each", ("0", "1")))}, tokens=64, around=model)
    running.run(store, curves)
    steps = {s.name: s for s in upstream([curves]) if s.name in ("calibrate.embed", "calibrate.start")}
    steps |= {f"observe {i}": step for i, states in calibration.states.items() if i for step in states}
    running.run(store, *steps.values())
    assert len(steps) == 4
    for name, step in steps.items():
        states = [f.size for n, f in store.manifest(step.key).files.items() if n.startswith("hidden")]
        spec = step.spec.output
        assert getattr(spec, "hidden", spec).handed_on == (4 if name in ("observe 1", "observe 2") else 0)
        promised = spec.hidden.nbytes if name.startswith("observe") else spec.nbytes
        assert promised == pytest.approx(sum(states), abs=100 * len(states)), name
