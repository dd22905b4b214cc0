"""Checkpoints whose experts lie in stacks, under other names or inside a multimodal model: read, pruned, written as they were."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moeflow.arch import Family, Layout
from moeflow.methods.checkpoint import export
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.checkpoint.intake import Found
from moeflow.methods.graph import Model
from moeflow.methods.slim import steps as slim
from moeflow.methods.slim.methods import Slimming
from moeflow.model.packed import pack
from moeflow.run import StepFailed
from moeflow.sources import LayoutWanted, pin
from moeflow.sources.elsewhere import ENDING
from moeflow.step import upstream
from tests import layouts, tiny
from tests.layouts import KINDS, model_in, pruned_to, raw, sliced
from tests.models import loaded
from tests.running import copied, run, store_in

ROUNDED = Slimming("round_to_nearest", group=8)
KEEP = {0: [0, 2, 3, 4, 6, 7], 1: [1, 2, 3, 5, 6, 7]}


def pulled(model: Model, folder: Path) -> Path:
    store, target = store_in(folder), checkpoint.checkpoint_of(model)
    run(store, target)
    out = folder / f"out-{target.key[-8:]}"
    store.fetch(target.key, out)
    return out


def whole(folder: Path, name: str) -> Any:
    """The model of a checkpoint of this kind."""
    config = AutoConfig.from_pretrained(folder)
    config._experts_implementation = "eager"
    return stock(getattr(transformers, KINDS[name].model), folder, config=config)


def stock(model_class: Any, folder: Path, **options: Any) -> Any:
    """The model of a checkpoint, in which transformers found each tensor that it has a place for, and no other."""
    model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def prompt(model: Any) -> dict[str, Any]:
    """Tokens, of which some stand for an image if the model sees any."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 80, (1, 12), generator=generator)
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        return {"input_ids": ids}
    if hasattr(vision, "temporal_patch_size"):
        patches = 3 * vision.temporal_patch_size * vision.patch_size**2
        ids[0, 3:8] = torch.tensor([92, 90, 90, 90, 90])
        ids[0, 8] = 93
        seen = {"pixel_values": torch.randn(16, patches, generator=generator), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        return {"input_ids": ids, "mm_token_type_ids": (ids == 90).int(), **seen}
    side, of_sizes = vision.image_size, model.config.model_type == "mistral3"
    ids[0, 3 : 7 if of_sizes else 4] = model.config.image_token_id
    sizes = {"image_sizes": torch.tensor([[side, side]])} if of_sizes else {}
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, side, side, generator=generator)} | sizes


@torch.inference_mode()
def answer(model: Any) -> Tensor:
    out: Tensor = model(**prompt(model)).logits
    return out


def same(model: Any, expected: Any) -> None:
    """Every weight is equal, and so are the answers, but for the order of sums that depends on where tensors lie in memory."""
    ours, theirs = model.state_dict(), expected.state_dict()
    assert set(ours) == set(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)
    torch.testing.assert_close(answer(model), answer(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_a_pruned_checkpoint_is_the_sliced_original_in_stock_transformers(name: str, tmp_path: Path) -> None:
    """In the form of its source: the same stacks, names and order, and a multimodal model whole, which answers an image alike."""
    source = layouts.write(name, tmp_path / "model")
    out = pulled(pruned_to(model_in(source, KINDS[name].found), KEEP), tmp_path)
    before, after = raw(source), raw(out)
    assert {shape(n) for n in before} == {shape(n) for n in after}
    for tensor in after:
        if tensor in before and before[tensor].shape[0] == 8 and before[tensor].shape != after[tensor].shape:
            kept = KEEP[int(tensor.split("layers.")[1].split(".")[0])]
            assert torch.equal(after[tensor], before[tensor][kept]), tensor
    same(whole(out, name), sliced(name, KEEP))


def shape(name: str) -> str:
    """A tensor's name without the numbers of experts."""
    return ".".join(
        "E" if part.isdigit() and at and name.split(".")[at - 1] == "experts" else part for at, part in enumerate(name.split("."))
    )


def test_config_json_changes_in_the_number_of_experts_alone_and_the_processor_s_files_travel(tmp_path: Path) -> None:
    source = layouts.write("qwen3_5_moe in stacks", tmp_path / "model")
    (source / "preprocessor_config.json").write_text('{"size": 4}')
    (source / "video_preprocessor_config.json").write_text('{"size": 5}')
    layouts.configure(source, lambda config: {"of_mine": 1} | config)
    out = pulled(pruned_to(model_in(source, KINDS["qwen3_5_moe in stacks"].found), KEEP), tmp_path)
    before, after = (json.loads((folder / "config.json").read_text(), object_pairs_hook=list) for folder in (source, out))
    old, new = dict(before)["text_config"], dict(after)["text_config"]
    assert [k for k, _ in before] == [k for k, _ in after] and [k for k, _ in old] == [k for k, _ in new]
    assert {k: (v, w) for (k, v), (_, w) in zip(old, new, strict=True) if v != w} == {"num_experts": (8, 6)}
    assert [v for k, v in before if k != "text_config"] == [v for k, v in after if k != "text_config"]
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert (out / file).read_bytes() == (source / file).read_bytes()
    again = pruned_to(
        model_in(out, KINDS["qwen3_5_moe in stacks"].found), {0: [0, 1, 2], 1: [3, 4, 5]}
    )  # a result is a source like any
    assert raw(pulled(again, tmp_path))[f"{WRAPPED}.1.mlp.experts.down_proj"].shape == (3, 32, 24)


WRAPPED = "model.language_model.layers"


def test_experts_are_written_one_by_one_when_told_and_refused_where_nothing_reads_that(tmp_path: Path) -> None:
    name = "qwen3_5_moe in stacks"
    source = replace(pin(str(layouts.write(name, tmp_path / "model")), kind="model"), layout="per_expert")
    out = pulled(pruned_to(checkpoint.pinned(source, found=KINDS[name].found), KEEP), tmp_path)
    assert f"{WRAPPED}.0.mlp.experts.5.gate_proj.weight" in raw(out) and not any("gate_up" in n for n in raw(out))
    same(whole(out, name), sliced(name, KEEP))
    other = replace(pin(str(layouts.write("gpt_oss", tmp_path / "other")), kind="model"), layout="per_expert")
    with pytest.raises(ValueError, match="layout=per_expert: transformers reads the experts of a gpt_oss .* leave it at"):
        checkpoint.pinned(other, found=KINDS["gpt_oss"].found)


LAYOUTS: tuple[LayoutWanted, ...] = ("source", "source", "per_expert")


@pytest.mark.parametrize("family", tiny.families())
def test_a_plain_family_as_transformers_has_it_in_memory_is_the_same_model(family: str, tmp_path: Path) -> None:
    """As `save_original_format=False` writes it: the same layer files, and a result in the form of its source, or of the hub."""
    hub = tiny.write(family, tmp_path / "hub")
    loaded(hub).save_pretrained(tmp_path / "memory", save_original_format=False)
    sources = [pin(str(tmp_path / folder), kind="model") for folder in ("hub", "memory", "memory")]
    models = [checkpoint.pinned(replace(s, layout=layout)) for s, layout in zip(sources, LAYOUTS, strict=True)]
    store = store_in(tmp_path)
    run(store, *(step for m in models for step in (*m.layers, m.rest)))
    assert len({tuple(store.manifest(layer.key).digest for layer in m.layers) for m in models}) == 1
    keep = {i: [0, 1, 2, 4, 5, 6] for i in models[0].moe_layers}
    outs = [pulled(pruned_to(m, keep), tmp_path) for m in models]
    assert any("gate_up_proj" in n for n in raw(outs[1])) and set(raw(outs[0])) == set(raw(outs[2]))
    expected = loaded(outs[0]).state_dict()
    for out in outs[1:]:
        assert all(torch.equal(t, expected[n]) for n, t in stock(AutoModelForCausalLM, out).state_dict().items())
    assert (outs[0] / "config.json").read_bytes() == (outs[2] / "config.json").read_bytes()


def test_where_layers_differ_the_text_model_is_written_alone_and_the_plan_says_so(tmp_path: Path) -> None:
    name = "qwen3_5_moe in stacks"
    source = layouts.write(name, tmp_path / "model")
    (source / "preprocessor_config.json").write_text("{}")
    model = pruned_to(model_in(source, KINDS[name].found), {0: [0, 1, 2, 3], 1: [0, 1, 2, 3, 4]})
    (note,) = checkpoint.checkpoint_of(model).spec.notes
    assert note.startswith("layers differ") and note.endswith("is the text model alone, without model.visual.")
    out = pulled(model, tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "moeflow_qwen3_5_moe_text" and config["moeflow_arch"]["model_type"] == "qwen3_5_moe_text"
    assert [entry["experts"] for entry in config["moeflow_layers"]] == [4, 5]
    assert "model.layers.1.mlp.experts.4.up_proj.weight" in raw(out) and not any("visual" in n for n in raw(out))
    assert not (out / "preprocessor_config.json").exists()


def test_the_text_model_of_a_wrapper_loads_alone(tmp_path: Path) -> None:
    """What speed is measured on."""
    name = "qwen3_5_moe in stacks"
    model = pruned_to(model_in(layouts.write(name, tmp_path / "model"), KINDS[name].found), KEEP)
    store, target = store_in(tmp_path), checkpoint.text_model_of(model)
    run(store, target)
    copied(store, target, tmp_path / "out")
    text = stock(AutoModelForCausalLM, tmp_path / "out")
    expected = sliced(name, KEEP).model.language_model.state_dict()
    assert all(torch.equal(t, text.model.state_dict()[n]) for n, t in expected.items())


@torch.inference_mode()
def test_a_model_that_is_trained_tells_its_family(tmp_path: Path) -> None:
    """Which a config.json of transformers does not tell."""
    source = layouts.write("granitemoe", tmp_path / "model")
    model = model_in(source, KINDS["granitemoe"].found)
    store, target = store_in(tmp_path), checkpoint.told_model_of(model)
    run(store, target)
    copied(store, target, tmp_path / "out")
    text, ids = stock(AutoModelForCausalLM, tmp_path / "out"), torch.arange(3, 15)[None]
    assert Family.of(text.config.to_dict()).arch == KINDS["granitemoe"].found.arch
    torch.testing.assert_close(text(ids).logits, whole(source, "granitemoe")(ids).logits, rtol=1e-5, atol=1e-5)


def test_names_outside_the_layers_are_the_source_s_in_a_packed_result(tmp_path: Path) -> None:
    """And moeflow's own where only moeflow's format can hold the layers."""
    source = layouts.write("granitemoe", tmp_path / "model")
    stacked = KINDS["granitemoe"].found
    names = (("model.embeddings.", "model.embed_tokens."), ("model.norm_f.", "model.norm."))
    layouts.edit(source, lambda ts: {on_disk(n, names): t for n, t in ts.items()})
    found = replace(stacked, layout=replace(stacked.layout, renamed=names, per_expert=True))
    model = model_in(source, found)
    assert model.form is not None
    uneven = export.written(pruned_to(model, {0: [0, 1, 2, 3], 1: [0, 1, 2]}), model.form)
    assert uneven.own and uneven.layout == Layout()
    slimmed = {i: slim.slimmed(model.essential, model.layers[i], (), at=i, how=ROUNDED, dtype="float32") for i in (0, 1)}
    even = export.written(model.with_layers(slimmed), model.form)
    assert not even.own and even.layout == Layout(renamed=names)


def on_disk(name: str, names: tuple[tuple[str, str], ...]) -> str:
    return next((disk + name.removeprefix(here) for disk, here in names if name.startswith(here)), name)


def test_a_wrapper_whose_experts_are_packed_stays_packed_and_whole(tmp_path: Path) -> None:
    """As Kimi-K2.5 is published: packed by compressed-tensors, one tensor for each matrix, inside a multimodal model."""
    source = layouts.write("qwen3_5_moe", tmp_path / "model")

    def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        codes = {n: pack(t.sign().to(torch.int8), torch.ones(t.shape[0], 1), 4) for n, t in tensors.items() if ".experts." in n}
        made = {n + end: t for n, parts in codes.items() for end, t in parts.items()}
        return {n: t for n, t in tensors.items() if n not in codes} | made

    layouts.edit(source, packed)
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["re:.*visual.*"]}
    layouts.configure(source, lambda config: config | {"quantization_config": said})
    out = pulled(pruned_to(model_in(source, KINDS["qwen3_5_moe"].found), KEEP), tmp_path)
    before, after = raw(source), raw(out)
    stem, name = f"{WRAPPED}.1.mlp.experts", "up_proj.weight_packed"
    assert torch.equal(after[f"{stem}.3.{name}"], before[f"{stem}.5.{name}"]) and f"{stem}.6.{name}" not in after
    assert {n for n in before if "visual" in n} <= set(after)
    assert json.loads((out / "config.json").read_text())["quantization_config"] == said


def test_the_tensors_that_are_known_of_a_family_are_asked_for(tmp_path: Path) -> None:
    source, found = layouts.write("granitemoe", tmp_path / "model"), KINDS["granitemoe"].found
    model = model_in(source, found)
    shapes = {n: shape for step in (*model.layers, model.rest) for n, (_, shape) in step.spec.output.tensors.items()}
    known = Found.from_json({"arch": found.arch.to_json(), "layout": found.layout.to_json(), "shapes": shapes})
    assert checkpoint.checkpoint_of(model_in(source, known)).key == checkpoint.checkpoint_of(model).key
    layouts.edit(source, lambda ts: ts | {"model.layers.1.self_attn.q_proj.bias": torch.zeros(32)})
    with pytest.raises(ValueError, match="layer 1 has model.layers.1.self_attn.q_proj.bias, which config.json leaves no"):
        model_in(source, known)
    layouts.edit(source, lambda ts: {n: t for n, t in ts.items() if "bias" not in n and n != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"the checkpoint has no tensor model.norm.weight, which config.json asks for"):
        model_in(source, known)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "gpt_oss", "granitemoe"])
def test_a_plan_counts_each_byte_of_a_stack_once(name: str, tmp_path: Path) -> None:
    source = layouts.write(name, tmp_path / "model")
    model = pruned_to(model_in(source, KINDS[name].found), KEEP)
    target, store = checkpoint.checkpoint_of(model), store_in(tmp_path)
    stored = sum(t.nbytes for n, t in raw(source).items() if "layers." in n and "visual" not in n)
    steps = upstream([target])
    assert sum(s.spec.reads for s in steps if s.name == "checkpoint.layer") == stored
    run(store, target)
    for step in steps:
        if step.name.startswith("checkpoint.") and step.name != "checkpoint.assemble_as":
            weights = (".safetensors", ENDING)  # also the notes of those that stay where they are
            sizes = sum(f.size for n, f in store.manifest(step.key).files.items() if n.endswith(weights))
            assert abs(step.spec.writes - sizes) <= 0.02 * sizes + 4000, step.name


def narrowed(tensor: str, *, to: int, dim: int = 0) -> Callable[[Path], None]:
    return lambda folder: layouts.edit(
        folder, lambda ts: {n: t.narrow(dim, 0, to).clone() if tensor in n else t for n, t in ts.items()}
    )


def without(*words: str) -> Callable[[Path], None]:
    return lambda folder: layouts.edit(folder, lambda ts: {n: t for n, t in ts.items() if not any(w in n for w in words)})


def lacking(folder: Path) -> None:
    layouts.configure(folder, lambda config: {k: v for k, v in config.items() if k != "text_config"})


def twice(folder: Path) -> None:
    layouts.edit(folder, lambda ts: ts | {f"{WRAPPED}.0.mlp.experts.0.down_proj.weight": torch.zeros(32, 24)})


def coded(folder: Path) -> None:
    layouts.edit(folder, lambda ts: {n + ("_blocks" if n.endswith("down_proj") else ""): t for n, t in ts.items()})


VL = "qwen3_vl_moe"


@pytest.mark.parametrize(
    "name, spoil, says",
    [
        (VL, lacking, r"config.json at .*: text_config is null where a qwen3_vl_moe has its text model; half of it is missing"),
        (VL, without("language_model", "lm_head"), "has no text model; it is half of a multimodal model, fetch the rest"),
        (VL, without("visual"), r"has nothing beside its text model \(model.visual.\); it is half of a multimodal model"),
        (VL, narrowed("0.mlp.experts.down_proj", to=7), "7 experts where config.json says num_(local_)?experts=8; correct one"),
        (VL, narrowed("0.mlp.experts.gate_up_proj", to=46, dim=1), r"gate_up_proj at .* asks for \(8, 32, 48\); correct one"),
        (VL, narrowed("1.mlp.experts.down_proj", to=23, dim=2), r"down_proj at .* asks for \(8, 32, 24\); correct one"),
        (VL, without("1.mlp.experts.down_proj"), "has no tensor model.layers.1.mlp.experts.0.down"),
        (VL, without("1.mlp.experts."), "layer 1 has 8 experts, its tensors say"),
        (VL, twice, "has model.layers.0.mlp.experts.0.down_proj.weight twice, in .*weight and in .*experts.down_proj;"),
        ("gpt_oss", coded, r"down_proj_blocks at .* asks for \(8, 64, 1, 16\); correct one"),
        ("gpt_oss", narrowed("0.mlp.experts.gate_up_proj_bias", to=60, dim=1), r"gate_up_proj_bias at .* asks for \(8, 64\);"),
        ("granitemoe", narrowed("0.block_sparse_moe.input_linear", to=47, dim=1), r"asks for \(8, 48, 32\); correct one"),
    ],
)  # fmt: skip
def test_a_stack_that_does_not_fit_is_named_at_plan_time(
    name: str, spoil: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    source = layouts.write(name, tmp_path / "model")
    spoil(source)
    with pytest.raises(ValueError, match=says) as error:
        model_in(source, KINDS[name].found)
    assert "\n" not in str(error.value)


def test_what_is_not_finite_in_a_stack_is_named(tmp_path: Path) -> None:
    source = layouts.write("granitemoe", tmp_path / "model")
    layouts.edit(
        source,
        lambda ts: {n: t.index_fill(0, torch.tensor(3), torch.inf) if "1.block_sparse_moe.out" in n else t for n, t in ts.items()},
    )
    with pytest.raises(StepFailed, match=r"layers.1.block_sparse_moe.experts.3.down_proj.weight holds NaN or infinite weights"):
        pulled(model_in(source, KINDS["granitemoe"].found), tmp_path)
