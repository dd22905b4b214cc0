"""A checkpoint in FP8 with a scale for each block, as DeepSeek-V3 is published: calibrated by layers, pruned bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeflow.arch import Family
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.prune.counts import Counts
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, moei2, naee, unified
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.trim import steps as trim
from moeflow.model.checkpoint import Tensors, save
from moeflow.model.layout import Folder, headers, read_config
from tests import layouts, tiny
from tests.models import calibrated, ids_of, loaded, logits, pulled
from tests.running import model_in, reports, run, store_in


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return in_fp8(tmp_path / "model", 8)


def in_fp8(folder: Path, block: int, scale_dtype: torch.dtype = torch.float32) -> Path:
    """All matrices of the layers but routers in FP8, with a scale for each block; blocks are cut off where they do not fit.

    A scale is a power of two if `scale_dtype` can be nothing else.
    """
    tiny.write("deepseek_v3", folder, dtype=torch.bfloat16)
    config = read_config(Folder(folder))
    made: dict[str, Tensor] = {}
    for name, t in Tensors(folder).items():
        if ".layers." in name and t.dim() == 2 and ".mlp.gate." not in name and name.endswith(".weight"):
            rows, columns = (-(-n // block) for n in t.shape)
            padded = torch.zeros(rows * block, columns * block)
            padded[: t.shape[0], : t.shape[1]] = t.float()
            scale = padded.view(rows, block, columns, block).abs().amax((1, 3)) / 448
            if scale_dtype == torch.float8_e8m0fnu:
                scale = scale.log2().ceil().exp2()
            codes = t.float() / spread(scale, block, t.shape)
            made |= {name: codes.to(torch.float8_e4m3fn), name + "_scale_inv": scale.to(scale_dtype)}
        else:
            made[name] = t
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save(made, folder / "model.safetensors")
    said = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return folder


def spread(scale: Tensor, block: int, shape: torch.Size) -> Tensor:
    return scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: shape[0], : shape[1]]


def plain(tensors: dict[str, Tensor], config: dict, folder: Path) -> Any:
    """The model of these tensors, in fp32 and with nothing packed."""
    folder.mkdir()
    save(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    return loaded(folder)


def raw(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize("end", [".weight_scale_inv", ".scale"])
def test_scales_that_are_powers_of_two_are_read_and_sliced_under_either_name(end: str, tmp_path: Path) -> None:
    source = in_fp8(tmp_path / "model", 8, torch.float8_e8m0fnu)
    held = {n.replace(".weight_scale_inv", end): t for n, t in raw(source).items()}
    save(held, source / "model.safetensors")
    store, model = store_in(tmp_path), model_in(source)
    keep = [0, 2, 3, 4, 6, 7]
    pruned = layouts.pruned_to(model, dict.fromkeys(model.moe_layers, keep))
    run(store, *pruned.layers)
    assert model.layers[1].spec.output.fp8 and model.layers[1].spec.output.expert_numel == 8 * 3 * 24 * 32
    for i in model.moe_layers:
        folder = store.artifact(pruned.layers[i].key)
        after, tensors = load_file(folder.file("layer.safetensors")), Tensors(folder)
        for new, old in enumerate(keep):
            for name in ("gate_proj", "up_proj", "down_proj"):
                a, b = (f"model.layers.{i}.mlp.experts.{e}.{name}" for e in (new, old))
                for one, other in ((a + ".weight", b + ".weight"), (a + end, b + end)):
                    assert torch.equal(after[one].view(torch.uint8), held[other].view(torch.uint8))
                scale = held[b + end].float()
                expected = held[b + ".weight"].float() * spread(scale, 8, held[b + ".weight"].shape)
                assert torch.equal(tensors[a + ".weight"].float(), expected)
        assert not any(n.endswith(end) for n in tensors)


def test_fp8_in_stacks_is_the_same_model(source: Path, tmp_path: Path) -> None:
    held, folder = raw(source), tmp_path / "stacks"
    made = {n: t for n, t in held.items() if ".experts." not in n}
    for i in (1, 2):
        stem = f"model.layers.{i}.mlp.experts"
        for end in ("", "_scale_inv"):
            gate, up, down = ([held[f"{stem}.{e}.{name}_proj.weight{end}"] for e in range(8)] for name in ("gate", "up", "down"))
            made[f"{stem}.gate_up_proj{end}"] = torch.stack([torch.cat(both) for both in zip(gate, up, strict=True)])
            made[f"{stem}.down_proj{end}"] = torch.stack(down)
    folder.mkdir()
    save(made, folder / "model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    store, models = store_in(tmp_path), (model_in(source), model_in(folder))
    run(store, *models[0].layers, *models[1].layers)
    assert all(
        store.manifest(a.key).digest == store.manifest(b.key).digest for a, b in zip(*(m.layers for m in models), strict=True)
    )
    keep = {i: [0, 1, 2, 4, 5, 6] for i in models[1].moe_layers}
    after = raw(pulled(store, layouts.pruned_to(models[1], keep), tmp_path))
    for name in (n for n in made if ".experts." in n):
        assert torch.equal(after[name].view(torch.uint8), made[name][[0, 1, 2, 4, 5, 6]].view(torch.uint8)), name


@pytest.mark.parametrize("block", [8, 16])
def test_it_is_read_as_it_is_multiplied_out(block: int, tmp_path: Path) -> None:
    """Also where the last blocks are cut off, which transformers does not multiply out."""
    source = in_fp8(tmp_path / "model", block)
    held, tensors = raw(source), Tensors(source)
    assert not any("scale_inv" in n for n in tensors)
    for name in tensors:
        expected = held[name].float()
        if name + "_scale_inv" in held:
            expected = expected * spread(held[name + "_scale_inv"], block, expected.shape)
        assert torch.equal(tensors[name].float(), expected)


@pytest.mark.parametrize("how", ["pruned", "trimmed", "unevenly"])
def test_it_is_pruned_by_slicing_and_stays_in_fp8(source: Path, how: str, tmp_path: Path) -> None:
    """What is measured by streaming is what transformers computes of the result."""
    store, model = store_in(tmp_path), model_in(source)
    seen = calibrated(model, tmp_path, dtype="float32")
    made = {
        "pruned": lambda: naee.prune(seen, 6, Search("reap")),
        "trimmed": lambda: trim.trim(seen, trim.Trimming("moe_blocks", 1)),
        "unevenly": lambda: moei2.prune(seen, Counts(14, rule="paper", importance="recon")),
    }[how]()
    out = pulled(store, made, tmp_path)
    config, before, after = read_config(Folder(out)), raw(source), raw(out)
    assert config["quantization_config"]["quant_method"] == "fp8"
    family = Family.of(config)
    told = json.loads((out / "moeflow.json").read_text())
    for choice in (c for c in told["choices"] if "layer" in c):
        for new, old in enumerate(choice["keep"]):
            pairs = zip(family.expert(choice["layer"], new), family.expert(choice["layer"], old), strict=True)
            for a, b in pairs:
                assert after[a].dtype == torch.float8_e4m3fn and torch.equal(
                    after[a].view(torch.uint8), before[b].view(torch.uint8)
                )
                assert torch.equal(after[a + "_scale_inv"], before[b + "_scale_inv"])
    assert {n for n, t in headers(Folder(out)).items() if t.dtype == "F8_E4M3"}
    target = checkpoint.checkpoint_of(made).reporting(
        *compare.reports(seen.model, made, compare.HeldOut("", 4, 16), seen.passed, tokens=seen.tokens)
    )
    run(store, target)
    whole = {n: t.float() for n, t in Tensors(out).items()}
    ids = ids_of(tmp_path)
    expected = logits(plain(whole, config, tmp_path / "plain"), tmp_path)
    nll = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert reports(store, target)["loss (token matrix)"]["compressed"] == pytest.approx(float(nll), abs=1e-4)
    rounded = {n: t.bfloat16().float() for n, t in whole.items()}
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval().float()  # without a GPU: multiplied out, to bf16
    torch.testing.assert_close(logits(found, tmp_path), logits(plain(rounded, config, tmp_path / "rounded"), tmp_path))
    assert model_in(out).layers[1].spec.output.fp8


def test_what_needs_weights_is_refused(source: Path, tmp_path: Path) -> None:
    seen = calibrated(model_in(source), tmp_path)
    with pytest.raises(ValueError, match="layer 1 is in FP8; slim the model that it was made of"):
        unified.slim(seen, Slimming(method="gptq", group=8, inputs="parallel"))
    with pytest.raises(ValueError, match="layer 1 is in FP8; decompose the model"):
        moei2.decompose(seen, Decomposition(ratio=0.3, ranks="uniform"))
    with pytest.raises(
        ValueError, match="has .*up_proj.other.scale in F8_E8M0, which is no scale of FP8 blocks; dequantize it to bf16"
    ):
        odd = tmp_path / "odd"
        odd.mkdir()
        save(
            {
                n.replace("up_proj.weight_scale_inv", "up_proj.other.scale"): t.to(torch.float8_e8m0fnu) if "scale" in n else t
                for n, t in raw(source).items()
            },
            odd / "model.safetensors",
        )
        (odd / "config.json").write_bytes((source / "config.json").read_bytes())
        model_in(odd)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = None
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is in FP8 without square blocks"):
        model_in(source)


def test_a_prediction_layer_in_fp8_is_pruned_by_slicing_codes_and_scales(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    copied = {n.replace("layers.2.", "layers.3."): t.clone() for n, t in tensors.items() if "layers.2." in n}
    copied |= {f"model.layers.3.{n}.weight": torch.ones(32, dtype=torch.bfloat16) for n in ("enorm", "hnorm", "shared_head.norm")}
    eh_proj = {"eh_proj.weight": torch.randn(32, 64).to(torch.float8_e4m3fn), "eh_proj.weight_scale_inv": torch.rand(4, 8)}
    save(tensors | copied | {f"model.layers.3.{n}": t for n, t in eh_proj.items()}, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    pruned = naee.prune(calibrated(model_in(source, mtp="prune"), tmp_path), 6, Search("reap"))
    store = store_in(tmp_path)
    run(store, *pruned.extra)
    keep = json.loads(store.artifact(pruned.choices[-1].key).file("choice.json").read_text())["keep"]
    after = load_file(store.artifact(pruned.extra[0].key).file("layer.safetensors"))
    experts = "model.layers.3.mlp.experts."
    for new, old in enumerate(keep):
        for end in ("up_proj.weight", "up_proj.weight_scale_inv", "down_proj.weight", "down_proj.weight_scale_inv"):
            same = after[f"{experts}{new}.{end}"], copied[f"{experts}{old}.{end}"]
            assert torch.equal(*(t.view(torch.uint8) for t in same))
    assert after["model.layers.3.eh_proj.weight"].dtype == torch.float8_e4m3fn
    assert sum(n.startswith(experts) for n in after) == 6 * 3 * 2
