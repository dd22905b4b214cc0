"""Compressed Experts: neutral at first, then the papers' formula, however the model is loaded; and what they save."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moeflow.arch import COMPRESSED, LAYERS, MAIN, Family
from moeflow.methods import graph
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.data import steps as data
from moeflow.methods.fewer_active import steps as fewer_active
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.recipes import naee
from moeflow.model.checkpoint import Tensors, read_moe, save
from moeflow.model.cost import active_parameters
from moeflow.model.fewer_active import by_weight
from moeflow.model.layout import Folder, read_config
from moeflow.model.passes import stream_of
from tests import tiny
from tests.compressed import compress, ids, load
from tests.models import attached
from tests.running import matrix_of, model_in, run, store_in

FORMS = ("three", "one")


def trained(source: Path, out: Path) -> Path:
    """The same checkpoint with vectors that do something."""
    torch.manual_seed(3)
    shutil.copytree(source, out)
    for file in out.glob("*.safetensors"):
        tensors = dict(Tensors(file))
        if any(".experts.compressed." in n for n in tensors):
            save({n: torch.randn_like(t) * 0.3 if ".experts.compressed." in n else t for n, t in tensors.items()}, file)
    return out


@pytest.fixture(scope="module", params=FORMS)
def both(request: pytest.FixtureRequest, family: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A checkpoint, and it with Compressed Experts as they begin and as they might be trained."""
    folder = tmp_path_factory.mktemp(f"{family.name}-{request.param}")
    neutral = attached(family, folder / "neutral", form=request.param)
    return family, neutral, trained(neutral, folder / "trained")


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("olmoe")
    neutral = attached(tiny.write("olmoe", folder / "plain"), folder / "neutral")
    return folder / "plain", neutral, trained(neutral, folder / "trained")


@torch.inference_mode()
def test_at_first_the_model_is_the_one_that_takes_the_main_experts_alone_bit_for_bit(both: tuple[Path, Path, Path]) -> None:
    plain_in, neutral_in, _ = both
    config = read_config(Folder(neutral_in))
    family, main = Family.of(config), config[MAIN]
    assert main == family.top_k // 2
    plain = load(plain_in, experts_implementation="grouped_mm")
    for layer in family.moe_layers:
        experts = plain.model.layers[layer].get_submodule(family.arch.block).experts
        forward = experts.forward

        def first(x: Tensor, index: Tensor, weights: Tensor, forward: Any = forward) -> Tensor:
            if family.arch.score != "sparsemixer":
                weights, index = by_weight(weights, index)
            return forward(x, index[:, :main], weights[:, :main])

        experts.forward = first
    assert torch.equal(load(neutral_in)(ids()).logits, plain(ids()).logits)


@torch.inference_mode()
def test_trained_vectors_scale_what_the_main_experts_see(both: tuple[Path, Path, Path]) -> None:
    """Token by token, from the formula: theta is the mean of the other experts' vectors by their weights."""
    _, neutral_in, trained_in = both
    config, tensors = read_config(Folder(trained_in)), Tensors(trained_in)
    family, main = Family.of(config), config[MAIN]
    model = load(trained_in)
    for layer in family.moe_layers:
        moe = read_moe(tensors, config, layer)
        x_TD = torch.randn(30, 32, generator=torch.Generator().manual_seed(layer))
        vectors = {n.rsplit(".", 1)[1]: 1 + tensors[n] for n in tensors if n.startswith(family.experts(layer) + "compressed.")}
        weights_Tk, index_Tk = moe.router.choose(moe.logits(x_TD))
        if family.arch.score != "sparsemixer":
            weights_Tk, index_Tk = by_weight(weights_Tk, index_Tk)
        expected_TD = torch.zeros_like(x_TD) if moe.shared is None else moe.shared_output(x_TD).clone()
        for t, x_D in enumerate(x_TD):
            parts = weights_Tk[t, main:] / weights_Tk[t, main:].sum()
            theta = {n: sum(p * v_EV[e] for p, e in zip(parts, index_Tk[t, main:], strict=True)) for n, v_EV in vectors.items()}
            for weight, e in zip(weights_Tk[t, :main], index_Tk[t, :main].tolist(), strict=True):
                expert = moe.experts[e]
                gate = expert.gate_FD @ (x_D * theta["gate" if "gate" in theta else "input"])
                up = expert.up_FD @ (x_D * theta["up" if "up" in theta else "input"])
                inner_F = torch.nn.functional.silu(gate) * up * theta.get("inner", torch.ones(()))
                expected_TD[t] += weight * (expert.down_DF @ inner_F)
        block = model.model.layers[layer].get_submodule(family.arch.block)
        out = block(x_TD[None])
        torch.testing.assert_close((out[0] if isinstance(out, tuple) else out)[0], expected_TD, rtol=1e-4, atol=1e-4)
    assert not torch.equal(model(ids()).logits, load(neutral_in)(ids()).logits)


def test_gradients_reach_every_vector_and_the_router(both: tuple[Path, Path, Path]) -> None:
    model = load(both[2]).train()
    model(ids(4), labels=ids(4)).loss.backward()
    family = Family.of(model.config.to_dict())
    vectors = {n: p for n, p in model.named_parameters() if ".experts.compressed." in n}
    assert vectors and all(p.grad is not None and p.grad.abs().sum() > 0 for p in vectors.values())
    routers = [p for n, p in model.named_parameters() if f"{family.arch.block}.{family.arch.block_router}.weight" in n]
    assert all(p.grad is not None for p in routers)


def _vectors(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".experts.compressed." in n}


def _neutral_config(plain: Path) -> Any:
    """The configuration of a checkpoint that has no Compressed Experts, asking for them."""
    config = AutoConfig.from_pretrained(plain).to_dict()
    config |= {"model_type": COMPRESSED + config["model_type"], MAIN: 1, LAYERS: [{"experts": 8, "compressed": "three"}] * 3}
    return AutoConfig.for_model(**config)


WAYS = {
    "plainly": lambda folder, **options: AutoModelForCausalLM.from_pretrained(folder, **options),
    "with a device map": lambda folder, **options: AutoModelForCausalLM.from_pretrained(folder, device_map="auto", **options),
    "onto the meta device first": lambda folder, **options: AutoModelForCausalLM.from_pretrained(
        folder, low_cpu_mem_usage=True, **options
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_they_are_neutral_where_the_checkpoint_has_none_and_as_stored_where_it_has_them(
    way: str, olmoe: tuple[Path, Path, Path]
) -> None:
    plain, _, stored = olmoe
    torch.full((1 << 16,), float("nan"))  # what uninitialised memory may well hold afterwards
    fresh = _vectors(WAYS[way](plain, config=_neutral_config(plain)))
    assert len(fresh) == 9 and all((v == 0).all() for v in fresh.values())
    vectors, tensors = _vectors(WAYS[way](stored)), Tensors(stored)
    assert len(vectors) == 9 and all(torch.equal(v, tensors[n]) for n, v in vectors.items())


def test_a_checkpoint_that_lacks_some_of_its_vectors_is_refused(olmoe: tuple[Path, Path, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(olmoe[2], tmp_path / "broken"))
    file = next(
        f for f in sorted(broken.glob("*.safetensors")) if any("layers.1.mlp.experts.compressed.up" in n for n in Tensors(f))
    )
    save({n: t for n, t in Tensors(file).items() if not n.endswith("layers.1.mlp.experts.compressed.up")}, file)
    with pytest.raises(ValueError, match="no tensor model.layers.1.mlp.experts.compressed.up, which its config.json asks for"):
        load(broken)


def test_a_model_made_on_meta_begins_neutral_and_takes_the_stored_vectors(olmoe: tuple[Path, Path, Path]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(olmoe[2]))
    model.to_empty(device="cpu").initialize_weights()
    assert all((v == 0).all() for v in _vectors(model).values())
    model.load_state_dict(load(olmoe[2]).state_dict())
    assert torch.equal(model(ids()).logits, load(olmoe[2])(ids()).logits)


@pytest.mark.slow
def test_a_ray_worker_loads_them_as_any_process_does(olmoe: tuple[Path, Path, Path], tmp_path: Path) -> None:
    plain, _, stored = olmoe
    config = _neutral_config(plain).to_dict()

    def work() -> list[Any]:
        import moeflow  # noqa: F401

        asked = AutoConfig.for_model(**config)
        models = AutoModelForCausalLM.from_pretrained(plain, config=asked), AutoModelForCausalLM.from_pretrained(stored)
        return [{n: p.detach().numpy() for n, p in m.named_parameters() if ".experts.compressed." in n} for m in models]

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        fresh, vectors = ray.get(ray.remote(work).remote())
    finally:
        ray.shutdown()
    tensors = Tensors(stored)
    assert len(fresh) == 9 and all((v == 0).all() for v in fresh.values())
    assert all(torch.equal(torch.from_numpy(v), tensors[n]) for n, v in vectors.items())


def test_saving_and_loading_keeps_the_vectors_bit_for_bit(both: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model = load(both[2])
    model.save_pretrained(tmp_path)
    before, after = Tensors(both[2]), Tensors(tmp_path)
    assert set(before) == set(after) and all(torch.equal(before[n], after[n]) for n in before)
    assert torch.equal(load(tmp_path)(ids()).logits, model(ids()).logits)


def test_streaming_is_the_loaded_model(olmoe: tuple[Path, Path, Path], tmp_path: Path) -> None:
    stored = olmoe[2]
    store, model = store_in(tmp_path), model_in(stored)
    matrix = data.tokens(matrix_of(tmp_path), model, Sample(8, 16))
    ends = calibrate.run(model, matrix, Pass(batch=8, shard=8, stage=2)).ends
    run(store, *ends)
    states = load_file(store.artifact(ends[0].key).file(graph.HIDDEN))["hidden_NLD"]
    ids_NL = torch.from_numpy(np.load(matrix_of(tmp_path).spec))
    stream = stream_of(read_config(Folder(stored)), "auto")
    with torch.inference_mode():
        logits = stream.logits(Tensors(stored))(states)
        assert torch.equal(logits, load(stored)(ids_NL).logits)


def test_they_come_with_non_uniform_low_rank_experts(tmp_path: Path) -> None:
    smaller = compress(tiny.write("olmoe", tmp_path / "olmoe"), tmp_path / "smaller")
    out = attached(smaller, tmp_path / "with", main=2)
    config = read_config(Folder(out))
    assert config[MAIN] == 2 and [f["compressed"] for f in config[LAYERS]] == ["three"] * 3 and "ranks" in config[LAYERS][1]
    assert torch.isfinite(load(out)(ids()).logits).all()


def test_what_cannot_be_attached_is_refused_in_one_line(olmoe: tuple[Path, Path, Path], tmp_path: Path) -> None:
    plain, neutral, _ = olmoe
    model = model_in(plain)
    with pytest.raises(ValueError, match="main=3 must be at least 1 and fewer than the 3 experts"):
        fewer_active.attach(model, fewer_active.CompressedExperts(main=3))
    with pytest.raises(ValueError, match="form='two' is not known; choose one of three, one"):
        fewer_active.attach(model, fewer_active.CompressedExperts(form="two"))
    again = model_in(neutral)
    with pytest.raises(ValueError, match="layer 0 has Compressed Experts, .* take the model without them"):
        fewer_active.attach(again)
    calibration = calibrate.run(again, data.tokens(matrix_of(tmp_path), again, Sample(8, 16)), Pass(batch=4, shard=4, stage=2))
    with pytest.raises(ValueError, match="layer 0 has Compressed Experts, .* prune the model without them"):
        naee.prune(calibration, keep=6)


PHIMOE = dict(
    model_type="phimoe", vocab_size=32064, hidden_size=4096, intermediate_size=6400, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, num_local_experts=16, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True,
    tie_word_embeddings=False,
)  # fmt: skip
OLMOE = dict(
    model_type="olmoe", vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
    num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False, tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "main", "before", "after"),
    [(PHIMOE, 1, 6.64, 4.12), (OLMOE, 4, 1.28, 0.879)],
    ids=["Phi-3.5-MoE", "OLMoE-1B-7B"],
)
def test_active_parameters_of_the_published_models(config: dict[str, Any], main: int, before: float, after: float) -> None:
    """The paper prints 7.45 to 4.93 B for Phi-MoE, as if its attention were not grouped, and 1.28 B to 878 M for OLMoE."""
    assert active_parameters(config) / 1e9 == pytest.approx(before, abs=0.005)
    assert active_parameters(config | {MAIN: main}) / 1e9 == pytest.approx(after, abs=0.005 if before > 2 else 0.0005)
