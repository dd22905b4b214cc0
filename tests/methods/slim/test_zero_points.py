"""Packed experts with zero points: written as compressed-tensors reads them, and loaded as the weights that were never packed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moeflow.arch import Family
from moeflow.engines import ENGINES, form_of
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.recipes import unified
from moeflow.methods.slim.methods import Slimming
from moeflow.model.checkpoint import Tensors
from moeflow.model.formats import layer_formats
from moeflow.model.packed import asymmetric
from moeflow.model.skeleton import layers_of
from moeflow.run import pulling
from moeflow.serve.pieces import Pieces
from tests import running, tiny

SAMPLE = Sample(4, 16)
EXPERTS = "model.layers.0.mlp.experts.down_proj"


def slimmed(folder: Path, method: str, bits: int, **more: Any) -> dict[bool, Path]:
    """A tiny model with asymmetric experts, packed (True) and as their weights (False), pulled."""
    model = running.model_in(tiny.write("mixtral", folder / "model"))
    matrix = data.tokens(running.matrix_of(folder, sequences=4), model, SAMPLE)
    calibration = calibrate.run(model, matrix, Pass(batch=2))
    store, out = running.store_in(folder), {}
    for packed in (True, False):
        how = Slimming(method, bits=bits, group=16, symmetric=False, packed=packed, **more)
        target = checkpoint.checkpoint_of(unified.slim(calibration, how))
        running.run(store, target)
        out[packed] = folder / f"packed-{packed}"
        store.fetch(target.key, out[packed])
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


@torch.inference_mode()
@pytest.mark.parametrize(("method", "bits"), [("gptq", 4), pytest.param("round_to_nearest", 8, marks=pytest.mark.slow)])
def test_what_is_loaded_are_the_unpacked_weights_bit_for_bit(method: str, bits: int, tmp_path: Path) -> None:
    made = slimmed(tmp_path, method, bits)
    said = json.loads((made[True] / "config.json").read_text())
    (group,) = said["quantization_config"]["config_groups"].values()
    assert group["weights"]["symmetric"] is False and said["model_type"] == "moeflow_mixtral"
    packed, plain = (AutoModelForCausalLM.from_pretrained(made[p], dtype=torch.float32).eval() for p in (True, False))
    own, other = packed.state_dict(), plain.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[n], other[n]) for n in own)
    pieces, family = Pieces(Family.of(said), zeros=asymmetric(said)), Family.of(said)  # as vLLM's plug-in unpacks them
    for i, (layer, format) in enumerate(zip(layers_of(packed), layer_formats(said), strict=True)):
        pieces.add(i, format, layer.get_submodule(family.arch.block).experts)  # type: ignore[arg-type]
    assert not torch.equal(packed.state_dict()[EXPERTS], other[EXPERTS])  # all are zero now
    for name, tensor in tensors(made[True]).items():
        pieces.take(name, tensor)
    pieces.check_whole(str(made[True]))
    assert all(torch.equal(t, other[n]) for n, t in packed.state_dict().items())
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**group["weights"]))
    stored, read = tensors(made[True]), Tensors(made[True])
    name = next(n.removesuffix("_packed") for n in stored if n.endswith("_packed"))
    ends = {f"weight{end}": stored[name + end] for end in ("_packed", "_scale", "_shape", "_zero_point")}
    unpacked = BaseCompressor.get_value_from_registry("pack-quantized").decompress(ends, scheme)["weight"]
    assert torch.equal(unpacked, read[name]) and torch.equal(read[name], tensors(made[False])[name])


def test_an_engine_that_reads_them_gets_the_familys_own_format_and_others_are_told(tmp_path: Path) -> None:
    made = slimmed(tmp_path, "round_to_nearest", 4)[True]
    form = form_of(json.loads((made / "config.json").read_text()))
    assert "reads no zero points" in form.why_not(ENGINES["transformers"])[0]
    assert not form.why_not(ENGINES["moeflow"]) and not form.why_not(ENGINES["vllm-moeflow"])
    pulling.for_engine(made, ENGINES["vllm"])
    said = json.loads((made / "config.json").read_text())
    assert said["model_type"] == "mixtral" and "moeflow_layers" not in said and said["architectures"] == ["MixtralForCausalLM"]
    assert said["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] is False


def test_a_checkpoint_that_lacks_them_is_not_loaded(tmp_path: Path) -> None:
    made = slimmed(tmp_path, "round_to_nearest", 4)[True]
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = True
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has zero points, and config.json says symmetric=True of it"):
        AutoModelForCausalLM.from_pretrained(made)
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    (made / "config.json").write_text(json.dumps(config))
    index = json.loads((made / "model.safetensors.index.json").read_text())
    for file in made.glob("*.safetensors"):
        save_file({n: t for n, t in load_file(file).items() if not n.endswith("_zero_point")}, file)
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if not n.endswith("_zero_point")}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has no zero points, and config.json says symmetric=False of it"):
        AutoModelForCausalLM.from_pretrained(made)
