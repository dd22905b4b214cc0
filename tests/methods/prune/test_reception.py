"""The KT-Reception Field: a tree over real decoder layers gives what running every combination through the model gives."""

import itertools
from pathlib import Path

import pytest
import torch

from moeflow.arch import Family
from moeflow.methods.prune import reception
from moeflow.model.checkpoint import Tensors, read_moe, save
from moeflow.model.layout import Folder, headers, kept, read_config
from moeflow.model.passes import stream_of
from moeflow.model.stream import HIDDEN, Stream


def layer_files(source: Path, folder: Path) -> list[Path]:
    tensors, names = Tensors(source), headers(Folder(source))
    made = []
    for layer in range(int(read_config(Folder(source))["num_hidden_layers"])):
        path = folder / f"layer-{layer}.safetensors"
        save({n: tensors[n] for n in names if n.startswith(f"model.layers.{layer}.")}, path)
        made.append(path)
    return made


@torch.inference_mode()
def test_the_tree_gives_the_loss_of_every_combination(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(Folder(family))
    files = layer_files(family, tmp_path)
    layers = Family.of(config).moe_layers[-2:]
    span = list(range(layers[0], layers[-1] + 1))
    sets = {i: [[0, 1, 2, 4, 5, 6], [1, 2, 3, 5, 6, 7], [0, 2, 3, 4, 6, 7]] for i in layers}
    start_NLD = torch.randn(4, 8, int(config["hidden_size"]))
    save({"hidden_NLD": start_NLD}, tmp_path / "hidden.safetensors")

    def through(paths: dict[int, Path]) -> torch.Tensor:
        stream, h_NLD = stream_of(config, "float32"), start_NLD
        for i in span:
            h_NLD = stream.run(stream.layer(Tensors(paths[i]), i), i, {HIDDEN: h_NLD})[HIDDEN]
        return h_NLD

    goal_NLD = through(dict(enumerate(files)))
    expected = {}
    for combination in itertools.product(range(3), repeat=len(layers)):
        paths = dict(enumerate(files))
        for i, which in zip(layers, combination, strict=True):
            tensors, choice = Tensors(files[i]), sets[i][which]
            names = kept(tensors, config, i, choice)
            paths[i] = tmp_path / "pruned" / f"{i}-{which}.safetensors"
            paths[i].parent.mkdir(exist_ok=True)
            save({new: tensors[old][choice] if sliced else tensors[old] for old, (new, sliced) in names.items()}, paths[i])
        expected[combination] = float((through(paths) - goal_NLD).double().norm())
    ran = []
    filled = Stream.layer
    monkeypatch.setattr(Stream, "layer", lambda self, t, i: ran.append(i) or filled(self, t, i))
    losses = reception.losses(
        config, [(i, files[i]) for i in span], sets, tmp_path / "hidden.safetensors", None,
        batch=2, dtype="float32", progress=lambda *_: None,
    )  # fmt: skip
    assert losses.keys() == expected.keys()
    for combination, loss in expected.items():
        assert losses[combination] == pytest.approx(loss, rel=1e-4)
    assert len(ran) == 2 * len(span)  # each layer is filled for the goal, and once for the whole tree
    behind = tmp_path / "behind.safetensors"
    save({"hidden_NLD": goal_NLD + 1}, behind)
    elsewhere = reception.losses(
        config, [(i, files[i]) for i in span], sets, tmp_path / "hidden.safetensors", behind,
        batch=2, dtype="float32", progress=lambda *_: None,
    )  # fmt: skip
    assert elsewhere[0, 0] != pytest.approx(losses[0, 0], rel=1e-3)


@torch.inference_mode()
def test_a_span_of_one_layer_weighs_its_sets_as_the_layer_does(family: Path, tmp_path: Path) -> None:
    config = read_config(Folder(family))
    files = layer_files(family, tmp_path)
    layer = Family.of(config).moe_layers[-1]
    sets = [[0, 1, 2, 4, 5, 6], [1, 2, 3, 5, 6, 7]]
    start_NLD = torch.randn(2, 8, int(config["hidden_size"]))
    save({"hidden_NLD": start_NLD}, tmp_path / "hidden.safetensors")
    losses = reception.losses(
        config, [(layer, files[layer])], {layer: sets}, tmp_path / "hidden.safetensors", None,
        batch=2, dtype="float32", progress=lambda *_: None,
    )  # fmt: skip
    stream = stream_of(config, "float32")
    module, inputs = stream.layer(Tensors(files[layer]), layer), []
    module.get_submodule(Family.of(config).arch.block).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    stream.run(module, layer, {HIDDEN: start_NLD})
    moe, x_TD = read_moe(Tensors(files[layer]), config, layer), inputs[0].flatten(0, -2)
    for which, choice in enumerate(sets):
        assert losses[which,] == pytest.approx(float((moe.keep(choice)(x_TD) - moe(x_TD)).double().norm()), rel=1e-3)
