"""Families with routers, names or layers of other kinds, by an `Arch` in config.json: the same promises as for all."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moeflow.arch import Family
from moeflow.methods.calibrate import forking
from moeflow.methods.prune import reception
from moeflow.methods.prune.gram import Weighed
from moeflow.model import layout, passes
from moeflow.model.alternatives import Kept
from moeflow.model.checkpoint import Tensors, of_experts, read_moe, save
from moeflow.model.formats import Format, config_of
from moeflow.model.layout import Folder, file_of, read_config
from moeflow.model.spec import Recording
from moeflow.model.stream import HIDDEN, Stream
from moeflow.model.trimmed import returns_a_tuple
from tests import compressed, normal
from tests.model.test_families import equal_whole, streamed

KEPT = [0, 2, 3, 4, 6, 7]


def some(*names: str) -> list[object]:
    """These families as a test's parameters; those behind the first only with `--slow`."""
    return [pytest.param(n, marks=[pytest.mark.slow] if at else []) for at, n in enumerate(names)]


ALL = some("glm_moe_dsa", *(n for n in normal.FAMILIES if n != "glm_moe_dsa"))


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> "Written":
    return Written(tmp_path_factory.mktemp("normal"))


class Written:
    """Each family's tiny checkpoint, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str) -> Path:
        out = self.folder / name
        return out if out.exists() else normal.write(name, out)


def ids(n: int = 2, length: int = 20) -> Tensor:
    return torch.randint(3, 96, (n, length), generator=torch.Generator().manual_seed(1))


def without_progress(*_: object) -> None:
    pass


def split(folder: Path, out: Path) -> list[tuple[int, Path]]:
    """A checkpoint as one file per layer and one for the rest."""
    tensors, layers = Tensors(folder), []
    (out / "rest").mkdir(parents=True)
    save({n: tensors[n] for n in tensors if ".layers." not in n}, out / "rest" / "rest.safetensors")
    for i in range(Family.of(read_config(Folder(folder))).num_layers):
        save({n: tensors[n] for n in tensors if n.startswith(f"model.layers.{i}.")}, out / f"layer-{i}.safetensors")
        layers.append((i, out / f"layer-{i}.safetensors"))
    return layers


@pytest.mark.parametrize("name", ALL)
@torch.inference_mode()
def test_streaming_is_the_whole_model_bit_for_bit(name: str, written: Written) -> None:
    equal_whole(streamed(written(name), ids()), normal.load(written(name)), ids())


@pytest.mark.slow
@pytest.mark.parametrize("name", normal.FAMILIES)
@torch.inference_mode()
def test_streaming_is_the_whole_model_in_bf16(name: str, tmp_path: Path) -> None:
    folder = normal.write(name, tmp_path / "model", dtype=torch.bfloat16)
    equal_whole(streamed(folder, ids()), normal.load(folder, dtype=torch.bfloat16), ids())


@pytest.mark.parametrize("name", ALL)
@torch.inference_mode()
def test_our_layer_computes_what_transformers_computes(name: str, written: Written) -> None:
    config, model = read_config(Folder(written(name))), normal.load(written(name))
    family, x_TD = Family.of(config), torch.randn(200, config["hidden_size"])
    for layer in family.moe_layers:
        theirs = model.model.layers[layer].get_submodule(family.arch.block)(x_TD[None])
        theirs_TD = (theirs[0] if isinstance(theirs, tuple) else theirs).view(x_TD.shape)
        ours = read_moe(Tensors(written(name)), config, layer)
        torch.testing.assert_close(ours(x_TD), theirs_TD, rtol=1e-5, atol=1e-5)
        by_all = torch.einsum("te,ted->td", ours.weights(x_TD), ours.expert_outputs(x_TD))
        torch.testing.assert_close(ours.routed_output(x_TD), by_all, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", some("ernie4_5_moe", "llama4_text", "gpt_oss", "nemotron_h"))
@torch.inference_mode()
def test_any_subset_is_weighed_as_the_layer_without_the_others_computes(name: str, written: Written) -> None:
    """For each kind of router: a softmax with a bias, one that weighs inputs, one with an offset, one with a sigmoid and a bias."""
    config = read_config(Folder(written(name)))
    moe = read_moe(Tensors(written(name)), config, Family.of(config).moe_layers[-1])
    x_TD, allowed_E = torch.randn(60, config["hidden_size"]), torch.tensor([e in KEPT for e in range(8)])
    sliced = moe.keep(KEPT)
    torch.testing.assert_close(moe.weights(x_TD, allowed_E)[:, KEPT], sliced.weights(x_TD))
    exact = (sliced(x_TD) - moe(x_TD)).double().square().sum().sqrt()
    torch.testing.assert_close(Weighed.of(moe, [x_TD])(allowed_E[None])[0], exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", some("llama4_text", *(n for n in normal.FAMILIES if n != "llama4_text")))
@torch.inference_mode()
def test_what_is_recorded_is_what_the_layer_computes(name: str, written: Written, tmp_path: Path) -> None:
    """Whatever a family's router returns; and recording changes no bit."""
    folder = written(name)
    config, layers = read_config(Folder(folder)), split(folder, tmp_path)
    passes.embed(config, Folder(tmp_path / "rest"), ids(), tmp_path / "start", dtype="float32")
    run: dict[str, Any] = {"count": len(layers), "batch": 2, "dtype": "float32", "progress": without_progress}
    passes.through(config, tmp_path / "start", layers, tmp_path / "end", recording=Recording(10**9), **run)
    passes.through(config, tmp_path / "start", layers, tmp_path / "plain", **run)
    assert torch.equal(load_file(tmp_path / "end")[HIDDEN], load_file(tmp_path / "plain")[HIDDEN])
    for layer in Family.of(config).moe_layers:
        mine, moe = load_file(tmp_path / file_of(layer)), read_moe(Tensors(folder), config, layer)
        x_TD, weighs_input = mine["x_RD"], moe.router.arch.weighs_input
        weights_TE = moe.weights(x_TD).double()
        of_input_TE = weights_TE * moe.router.scores(moe.logits(x_TD)) if weighs_input else weights_TE
        routed_TE, norm_TE = (weights_TE > 0).double(), moe.expert_outputs(x_TD).norm(dim=-1).double()
        expected = {
            "logits_TE": moe.logits(x_TD).float(),
            "count_E": routed_TE.sum(0),
            "weight_E": of_input_TE.sum(0),
            "norm_E": (routed_TE * norm_TE).sum(0),
            "reap_E": (weights_TE * norm_TE).sum(0),
            "score_E": moe.router.scores(moe.logits(x_TD)).double().sum(0),
            "output_sq": moe(x_TD).double().square().sum(),
        }
        for what, value in expected.items():
            torch.testing.assert_close(mine[what], value, rtol=2e-4, atol=2e-4, msg=f"layer {layer}: {what}")


@pytest.mark.parametrize("name", some("granitemoe", "gpt_oss", "glm_moe_dsa", "llama4_text"))
@torch.inference_mode()
def test_a_fork_is_the_model_whose_layer_is_pruned(name: str, written: Written, tmp_path: Path) -> None:
    """Also where the block returns a pair, where its output is scaled before it is added, where a layer hands more on."""
    folder = written(name)
    config, layers = read_config(Folder(folder)), split(folder, tmp_path)
    forked = Family.of(config).moe_layers[0]
    pruned = []
    for layer, file in layers:
        if layer == forked:
            file = kept(file, config, layer, tmp_path)
        pruned.append((layer, file))
    passes.embed(config, Folder(tmp_path / "rest"), ids(), tmp_path / "start", dtype="float32")
    run: dict[str, Any] = {"count": len(layers), "batch": 1, "dtype": "float32", "progress": without_progress}
    for what, stack in (("whole", layers), ("pruned", pruned)):
        passes.through(config, tmp_path / "start", stack, tmp_path / what, **run)
    stages = [forking.Stage(i, file, {"f": Kept(tuple(KEPT))} if i == forked else {}) for i, file in layers]
    start = load_file(tmp_path / "start")
    own_NLD, forks = forking.through(config, start, stages, forks=1, batch=1, dtype="float32")
    goal_NLD = load_file(tmp_path / "pruned")[HIDDEN]
    assert torch.equal(own_NLD, load_file(tmp_path / "whole")[HIDDEN])
    torch.testing.assert_close(forks[forked, "f"], goal_NLD, rtol=1e-4, atol=1e-4)

    sets = {forked: [KEPT]}
    found = reception.losses(
        config, layers, sets, tmp_path / "start", tmp_path / "pruned", batch=1, dtype="float32", progress=without_progress
    )
    assert found[(0,)] < 1e-3 * goal_NLD.norm()


@pytest.mark.parametrize("name", some("gpt_oss", *(n for n in normal.FAMILIES if n != "gpt_oss")))
@torch.inference_mode()
def test_a_compressed_checkpoint_loads_whole_and_saves_what_it_was(name: str, written: Written, tmp_path: Path) -> None:
    """Layers with different numbers of experts and ranks: transposed, with biases, or without a gate."""
    folder = written(name)
    config, original = read_config(Folder(folder)), normal.load(folder)
    family = Family.of(config)
    for layer in family.moe_layers:
        moe = read_moe(Tensors(folder), config, layer)
        allowed_E = torch.tensor([e in compressed.KEPT[layer] for e in range(8)])
        cut = partial(compressed.reference_layer(moe, layer), allowed_E=allowed_E)
        module, block = original.model.layers[layer], family.arch.block
        module.set_submodule(block, Block(cut, returns_a_tuple(module.get_submodule(block))))
    made = compressed.compress(folder, tmp_path / "made")
    both: Any = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    model, info = both
    assert type(model).__name__.startswith("Moeflow") and not any(info[k] for k in ("missing_keys", "unexpected_keys"))
    torch.testing.assert_close(model.eval()(ids()).logits, original(ids()).logits, rtol=2e-4, atol=2e-4)
    assert torch.equal(streamed(made, ids())[-1], model(ids(), use_cache=False).logits)
    model.save_pretrained(tmp_path / "saved")
    before, after = Tensors(made), Tensors(tmp_path / "saved")
    assert set(before) == set(after) and all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_the_embedding_is_the_head_where_config_json_ties_them_alone(tied: bool, written: Written) -> None:
    """Else a head that is missing is told, by its name."""
    folder = written("glm4_moe")
    tensors = {n: t for n, t in Tensors(folder).items() if n != "lm_head.weight"}
    stream = Stream(read_config(Folder(folder)) | {"tie_word_embeddings": tied}, dtype="float32")
    if not tied:
        with pytest.raises(ValueError, match=r"has no tensor lm_head.weight, which its config.json asks for"):
            stream.logits(tensors)
        return
    x_NLD = torch.randn(1, 3, 32)
    expected = Stream(read_config(Folder(folder)), dtype="float32").logits(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    )
    assert torch.equal(stream.logits(tensors)(x_NLD), expected(x_NLD))


@pytest.mark.parametrize("name", some("gpt_oss", "nemotron_h", "granitemoe", "llama4_text"))
@torch.inference_mode()
def test_a_block_that_is_gone_adds_nothing(name: str, written: Written, tmp_path: Path) -> None:
    """Where a layer takes a pair from its block, and where it asks for its norm's precision."""
    folder = written(name)
    config, tensors = read_config(Folder(folder)), dict(Tensors(folder))
    family = Family.of(config)
    layer = family.moe_layers[0]
    left = layout.names_without_experts([n for n in tensors if n.startswith(family.prefix(layer))], config, layer, whole=True)
    others = {n: t for n, t in tensors.items() if not n.startswith(family.prefix(layer)) or n in left}
    formats = [Format(8) if i in family.moe_layers and i != layer else None for i in range(family.num_layers)]
    formats[layer] = Format(0, gone="moe")
    compressed.write(others, config_of(config, formats), tmp_path / "made")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    original = normal.load(folder)
    module, block = original.model.layers[layer], family.arch.block
    module.set_submodule(block, Block(torch.zeros_like, returns_a_tuple(module.get_submodule(block))))
    logits = model(ids()).logits
    torch.testing.assert_close(logits, original(ids()).logits)
    torch.testing.assert_close(streamed(tmp_path / "made", ids())[-1], logits)


class Block(nn.Module):
    """A MoE block of ours in a model of transformers, which returns one value or a pair."""

    def __init__(self, moe: Callable[[Tensor], Tensor], pair: bool) -> None:
        super().__init__()
        self.moe, self.pair = moe, pair

    def forward(self, x_NLD: Tensor) -> object:
        y_NLD = self.moe(x_NLD.flatten(0, 1)).view(x_NLD.shape)
        return (y_NLD, None) if self.pair else y_NLD


def kept(file: Path, config: dict[str, object], layer: int, out: Path) -> Path:
    """A layer's file with the experts `KEPT` alone."""
    tensors = Tensors(file)
    names = layout.kept(tensors, config, layer, KEPT)
    save(
        {new: of_experts(tensors[old], KEPT) if sliced else tensors[old] for old, (new, sliced) in names.items()},
        out / "pruned.safetensors",
    )
    return out / "pruned.safetensors"
