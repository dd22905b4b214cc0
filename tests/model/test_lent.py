"""A layer is copied once, from the pages of its file to where it computes, and has nothing in common with them afterwards."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeflow.arch import Family
from moeflow.model.checkpoint import Tensors
from moeflow.model.factors import fused
from moeflow.model.formats import format_of
from moeflow.model.layout import SingleFile
from moeflow.model.stream import Stream
from moeflow.run import in_process
from moeflow.step import Context, step
from moeflow.store import Store
from tests import tiny


@step("test.kept", version=1)
def kept(context: Context, *, path: str) -> None:
    (context.out / "layer.safetensors").write_bytes(Path(path).read_bytes())


def test_a_layer_out_of_the_store_may_be_written_to_and_its_file_stays(tmp_path: Path) -> None:
    source = tiny.write("mixtral", tmp_path / "model", hidden_size=512, intermediate_size=1024)
    config = json.loads((source / "config.json").read_text())
    family = Family.of(config)
    wanted = {n: t for n, t in load_file(source / "model.safetensors").items() if n.startswith(family.prefix(0))}
    save_file(wanted, tmp_path / "layer")
    stored, store = kept(path=str(tmp_path / "layer")), Store.open(str(tmp_path / "store"))
    in_process.run([stored], store)
    tensors = Tensors(store.artifact(stored.key))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = Stream(config, dtype="float32").layer(tensors, 0)
    experts = module.get_submodule(f"{family.arch.block}.experts")
    read = Tensors(SingleFile(tmp_path / "layer"))
    expected = fused(dict(read), family, format_of({n: tuple(t.shape) for n, t in wanted.items()}, config, 0), 0, experts)
    assert {*expected} == {n for n, _ in experts.named_parameters()}
    assert all(torch.equal(parameter, expected[name]) for name, parameter in experts.named_parameters())
    for parameter in experts.parameters():
        parameter.zero_()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("name", ["plain", "scaled"])
def test_what_is_lent_is_what_is_read(name: str, tmp_path: Path) -> None:
    scaled = {"scaled": torch.randn(8, 16).to(torch.float8_e4m3fn), "scaled_scale_inv": torch.full((1, 1), 0.5)}
    save_file({"plain": torch.randn(4, 8)} | scaled, tmp_path / "file")
    tensors = Tensors(SingleFile(tmp_path / "file"))
    assert torch.equal(tensors.lent(name), tensors[name]) and tensors[name].dtype == torch.float32
    with pytest.raises(KeyError):
        tensors.lent("neither")
