"""Dynamic skipping: thresholds reach what they are set for, skipped experts cost nothing, what is served is what was measured."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moeflow import options
from moeflow.arch import Family
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.fewer_active import steps as fewer_active
from moeflow.methods.fewer_active.thresholds import median, threshold_for
from moeflow.methods.graph import HIDDEN, Calibration, Model, Pass, Sample
from moeflow.methods.recipes import compare, naee
from moeflow.model.checkpoint import Tensors, read_moe
from moeflow.model.fewer_active import statistic
from moeflow.model.layout import Folder, read_config
from moeflow.model.moe import MoELayer
from moeflow.model.passes import stream_of
from moeflow.model.routed_experts import RoutedExperts
from tests import tiny
from tests.compressed import compress
from tests.running import array_of, facts_of, matrix_of, model_in, reports, run, store_in

ACTIVE = 1.6


def calibrated(model: Model, folder: Path, **options: Any) -> Calibration:
    matrix = data.tokens(matrix_of(folder), model, Sample(8, 16))
    return calibrate.run(model, matrix, Pass(batch=4, shard=4, stage=2, **options))


@pytest.fixture(scope="module", params=tiny.families(without=("phimoe",)))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of every family but phimoe, whose experts' weights do not depend on each other: skipping is refused."""
    return tiny.write(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def smaller(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with other experts in each layer, some of them of low rank."""
    return compress(family, tmp_path_factory.mktemp("skipping") / family.name)


@pytest.fixture(scope="module")
def served(smaller: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], np.ndarray]:
    """That checkpoint with skipping, pulled; what its reports say; and the tokens of the calibration."""
    folder = tmp_path_factory.mktemp("served")
    store, model = store_in(folder), model_in(smaller)
    calibration = calibrated(model, folder, record=0)
    made = fewer_active.skip(calibration, fewer_active.Skipping(ACTIVE))
    target = checkpoint.checkpoint_of(made).reporting(
        *compare.reports(model, made, compare.HeldOut("", 8, 16), Pass(4), tokens=calibration.tokens)
    )
    ends = calibrate.run(made, calibration.tokens, Pass(batch=4, shard=4, stage=2, record=0)).ends
    run(store, target, *ends)
    states = torch.cat([load_file(store.artifact(e.key).file(HIDDEN))["hidden_NLD"] for e in ends])
    pulled = store.artifact(target.key)
    out = shutil.copytree(pulled.folder(), folder / "pulled")
    return out, reports(store, target) | {"states": states}, array_of(matrix_of(folder))


class Reference(nn.Module):
    """A layer's block, token by token, with the rule of skipping written out."""

    def __init__(self, moe: MoELayer, threshold: float, *, by_ratio: bool) -> None:
        super().__init__()
        self.moe, self.threshold, self.by_ratio, self.products, self.tokens = moe, threshold, by_ratio, 0, 0

    def forward(self, x_NLD: Tensor) -> Tensor:
        x_TD = x_NLD.flatten(0, 1)
        weights_Tk, index_Tk = self.moe.router.choose(self.moe.logits(x_TD))
        y_TD = torch.zeros_like(x_TD) if self.moe.shared is None else self.moe.shared_output(x_TD).clone()
        for t, x_D in enumerate(x_TD):
            chosen = list(zip(weights_Tk[t].tolist(), index_Tk[t].tolist(), strict=True))
            chosen.sort(key=lambda c: -c[0])
            total, stay = sum(w for w, _ in chosen), len(chosen)
            if self.by_ratio:
                stay = 1 if chosen[1][0] < self.threshold * chosen[0][0] else 2
            else:
                stay = min(i for i in range(1, stay + 1) if sum(w for w, _ in chosen[i:]) <= self.threshold * total)
            kept = sum(w for w, _ in chosen[:stay])
            grow = total / kept if self.moe.router.normalize else 1.0
            for weight, expert in chosen[:stay]:
                y_TD[t] += weight * grow * self.moe.experts[expert](x_D[None])[0]
            self.products += stay
            self.tokens += 1
        return y_TD.view(x_NLD.shape)


@torch.inference_mode()
def test_what_transformers_loads_computes_the_rule_and_what_was_measured(
    served: tuple[Path, dict[str, Any], np.ndarray], smaller: Path
) -> None:
    folder, rows, ids = served
    config = read_config(Folder(smaller))
    family = Family.of(config)
    done = facts_of(folder, "fewer_active.skipping")
    ids = torch.from_numpy(ids)
    plain, loaded = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (smaller, folder))
    references = []
    for layer in family.moe_layers:
        moe = read_moe(Tensors(smaller), config, layer)
        references.append(Reference(moe, done[layer][0]["threshold"], by_ratio=family.top_k == 2))
        plain.model.layers[layer].set_submodule(family.arch.block, references[-1])
    expected = plain(ids)
    torch.testing.assert_close(loaded(ids).logits, expected.logits, rtol=2e-4, atol=2e-4)
    mean = np.mean([r.products / r.tokens for r in references])
    assert rows["experts a token (token matrix)"]["compressed"] == pytest.approx(mean, abs=1e-6)
    assert rows["expert products a token (token matrix)"]["original"] == family.top_k * len(references)
    stream = stream_of(config, "auto")
    logits = stream.logits(Tensors(smaller))(rows["states"])
    torch.testing.assert_close(logits, loaded(ids).logits, rtol=2e-4, atol=2e-4)


def test_as_many_experts_stay_as_were_wanted_on_the_calibration_tokens(served: tuple[Path, dict[str, Any], np.ndarray]) -> None:
    folder, rows, ids = served
    for (layer,) in facts_of(folder, "fewer_active.skipping").values():
        assert layer["active"] == pytest.approx(ACTIVE, abs=0.5 / ids.size + 1e-9) and layer["tokens"] == ids.size
    # the last layers see what skipping in the first ones left, which is not quite what was calibrated
    assert rows["experts a token (token matrix)"]["compressed"] == pytest.approx(ACTIVE, abs=0.15)


def test_a_pair_that_is_skipped_is_not_computed(served: tuple[Path, dict[str, Any], np.ndarray]) -> None:
    folder, rows, ids = served
    computed: list[int] = []
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for experts in (m for m in model.modules() if isinstance(m, RoutedExperts)):
        experts.act_fn.register_forward_hook(lambda _, __, inner_SF: computed.append(len(inner_SF)))
    with torch.inference_mode():
        model(torch.from_numpy(ids))
    assert sum(computed) / ids.size == pytest.approx(rows["expert products a token (token matrix)"]["compressed"])


def test_thresholds_stay_exact_in_bf16_and_are_saved_again(served: tuple[Path, dict[str, Any], np.ndarray], tmp_path: Path) -> None:
    folder = served[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    thresholds = {n: b for n, b in model.named_buffers() if ".skip." in n}
    stored = Tensors(folder)
    assert thresholds and {b.dtype for b in thresholds.values()} == {torch.float32}
    model.save_pretrained(tmp_path)
    again = Tensors(tmp_path)
    assert all(torch.equal(stored[n], again[n]) for n in stored if ".skip." in n)


def test_the_median_lets_half_of_the_tokens_skip(tmp_path: Path) -> None:
    weights = torch.rand(1001, 2).sort(-1, descending=True).values
    ratios = statistic(weights, "ratio")
    assert float(median(ratios)) == pytest.approx(float(np.median(ratios.numpy())))
    assert float(median(ratios[:-1])) == pytest.approx(float(np.median(ratios[:-1].numpy())))
    assert int((ratios < median(ratios)).sum()) == 500


@pytest.mark.parametrize("rule", ["ratio", "tail"])
def test_thresholds_for_one_expert_and_for_nearly_all(rule: str) -> None:
    k = 2 if rule == "ratio" else 5
    of = statistic(torch.rand(400, k).softmax(-1).sort(-1, descending=True).values, rule)
    for active in (1.0, 1.25, k - 0.01):
        bound = threshold_for(of, active)
        stay = of >= bound if rule == "ratio" else of > bound
        assert 1 + int(stay.sum()) / len(of) == pytest.approx(active, abs=1 / len(of))


def test_what_cannot_be_skipped_is_refused_in_one_line(tmp_path: Path) -> None:
    model = model_in(tiny.write("mixtral", tmp_path / "two"))
    calibration = calibrated(model, tmp_path)
    with pytest.raises(ValueError, match="active=2 experts a token must be at least 1 and fewer than the router's 2"):
        fewer_active.skip(calibration, fewer_active.Skipping(2))
    with pytest.raises(ValueError, match="skipping.active=half: it must be a number, or one of median"):
        options.changed("skipping", fewer_active.Skipping, None, {"active": "half"})
    with pytest.raises(ValueError, match="active=0: a token has at least one expert"):
        options.changed("skipping", fewer_active.Skipping, None, {"active": "0"})
    made = fewer_active.skip(calibration)
    again = calibrated(made, tmp_path)
    with pytest.raises(ValueError, match="layer 0 skips experts by a threshold .* prune the model without it"):
        naee.prune(again, keep=6)
    with pytest.raises(ValueError, match="layer 0 skips experts .* take the model without it"):
        fewer_active.skip(again)
    three = model_in(tiny.write("olmoe", tmp_path / "three"))
    with pytest.raises(ValueError, match="3 experts, for which there is no rule of a median"):
        naee.skipped(three, calibration.tokens, fewer_active.Skipping(), Pass())
    phimoe = model_in(tiny.write("phimoe", tmp_path / "phimoe"))
    with pytest.raises(ValueError, match="a phimoe weighs each of a token's experts by itself"):
        naee.skipped(phimoe, calibration.tokens, fewer_active.Skipping(1.5), Pass())
    one = model_in(tiny.write("mixtral", tmp_path / "one", num_experts_per_tok=1))
    with pytest.raises(ValueError, match="gives each token one expert; none is left to skip"):
        fewer_active.skip(calibrated(one, tmp_path))
