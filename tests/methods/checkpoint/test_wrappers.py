"""Multimodal models from beginning to end: looked at, the text half calibrated, pruned and measured, loaded and shown an image."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from moeflow.arch import Family
from moeflow.arch.found import Found
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, naee
from moeflow.model.checkpoint import Tensors, read_moe
from moeflow.model.skeleton import layers_of
from moeflow.model.structure.building import built
from moeflow.model.structure.listing import default
from moeflow.model.structure.looking import look
from moeflow.model.structure.names import scrambled
from moeflow.model.structure.tiny import tiny
from moeflow.model.trimmed import returns_a_tuple
from tests import layouts
from tests.layouts import raw
from tests.methods.checkpoint.test_layouts import answer, stock
from tests.model.test_other_families import Block, some
from tests.running import choices, matrix_of, reports, run, store_in, tensors_of

KEEP = 6
PROCESSOR = {"preprocessor_config.json": '{"size": 4}', "chat_template.jinja": "{{ messages }}"}


@dataclass(frozen=True)
class Pruned:
    """A tiny checkpoint and what the main pipeline's steps made of it."""

    name: str
    source: Path
    out: Path
    found: Found
    kept: dict[int, list[int]]
    rows: dict[str, Any]
    config: dict[str, Any]
    layers: dict[int, Path]  # of the source, as moeflow works on them


def seen(source: Path) -> Found:
    """What looking at a checkpoint finds, in this process."""
    config = json.loads((source / "config.json").read_text())
    return Found.from_json(json.loads(json.dumps(look(config, raw(source)).to_json())))


def write(name: str, folder: Path) -> Path:
    return mistral3(folder) if name == "mistral3" else layouts.write(name, folder)


def mistral3(folder: Path) -> Path:
    """A tiny Mistral Small 4, whose text half is a mistral4."""
    small = tiny(default("mistral3") | {"text_config": default("mistral4"), "image_token_index": 90}, layers=2)
    small["vision_config"] |= {"image_size": 56}
    model = built(small)
    scrambled(model, ())
    model.save_pretrained(folder)
    return folder


def prune(name: str, source: Path, folder: Path) -> Pruned:
    for file, text in PROCESSOR.items():
        (source / file).write_text(text)
    found = seen(source)
    original = layouts.model_in(source, found)
    matrix, passed = data.tokens(matrix_of(folder, vocabulary=80), original, Sample(8, 16)), Pass(batch=4, shard=4)
    pruned = naee.prune(calibrate.run(original, matrix, passed), KEEP, Search("reap"))
    measured = compare.reports(original, pruned, compare.HeldOut(matrix_of(folder, vocabulary=80).spec, 8, 16), passed)
    target, store = checkpoint.checkpoint_of(pruned).reporting(*measured), store_in(folder)
    run(store, target, *original.layers)
    store.fetch(target.key, folder / "out")
    layers = {i: folder / f"layer-{i}.safetensors" for i in original.moe_layers}
    for i, path in layers.items():
        save_file(tensors_of(store, original.layers[i]), path)
    chosen = {i: choice["keep"] for i, choice in choices(store, target).items()}
    return Pruned(name, source, folder / "out", found, chosen, reports(store, target), original.config, layers)


@pytest.fixture(scope="module", params=some("qwen3_vl_moe", "llama4", "qwen3_5_moe", "mistral3"))
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    folder = tmp_path_factory.mktemp("wrapper")
    return prune(request.param, write(request.param, folder / "model"), folder)


def test_what_is_beside_the_text_half_stays_bit_for_bit(pruned: Pruned) -> None:
    before, after = raw(pruned.source), raw(pruned.out)
    beside = {n for n in before if n.startswith(pruned.found.layout.beside)}
    assert len(beside) > 10 and beside == {n for n in after if n.startswith(pruned.found.layout.beside)}
    assert all(torch.equal(before[n], after[n]) for n in beside)
    assert all((pruned.out / file).read_text() == text for file, text in PROCESSOR.items())


@torch.inference_mode()
def test_an_image_is_answered_as_the_masked_original_answers_it(pruned: Pruned) -> None:
    """The pruned model loads whole, in stock transformers."""
    model_class = transformers.AutoModelForImageTextToText
    ours, theirs = (stock(model_class, folder) for folder in (pruned.out, pruned.source))
    for model in (ours, theirs):
        model.config.get_text_config()._experts_implementation = "eager"
    masked(theirs, pruned)
    near(answer(ours), answer(theirs))


def masked(model: Any, pruned: Pruned) -> None:
    """Forbid the experts that are gone."""
    family = Family.of(pruned.config)
    for layer, kept in pruned.kept.items():
        allowed_E = torch.tensor([e in kept for e in range(family.num_experts)])
        moe = partial(read_moe(Tensors(pruned.layers[layer]), pruned.config, layer), allowed_E=allowed_E)
        module, block = layers_of(text_of(model))[layer], family.arch.block
        module.set_submodule(block, Block(moe, returns_a_tuple(module.get_submodule(block))))


def text_of(model: Any) -> Any:
    """The part of a multimodal model with its text model's configuration."""
    text = model.config.get_text_config()
    return next(m for m in model.modules() if getattr(m, "config", None) is text)


def near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * max(1.0, float(theirs.abs().max())))


def test_the_text_half_is_measured_like_any_model(pruned: Pruned) -> None:
    """Its size, its predictions, and its speed, where transformers has no class of it."""
    for what in ("parameters", "bytes", "operations at 2,048 tokens"):
        assert pruned.rows[what]["compressed"] < pruned.rows[what]["original"], what
    assert pruned.rows["decode"]["compressed"] > 0 and 0 < pruned.rows["KL to the original (tokens-8-16-0)"]["compressed"] < 2


@torch.inference_mode()
def test_a_text_half_without_a_class_of_its_own_loads_where_layers_differ(tmp_path: Path) -> None:
    """After `import moeflow`, with every tensor in its place; and it writes text."""
    source = layouts.write("qwen3_vl_moe", tmp_path / "model")
    kept = {0: [0, 1, 3, 4], 1: [0, 2, 3, 5, 6]}
    model = layouts.pruned_to(layouts.model_in(source, layouts.KINDS["qwen3_vl_moe"].found), kept)
    target, store = checkpoint.checkpoint_of(model), store_in(tmp_path)
    run(store, target)
    store.fetch(target.key, tmp_path / "out")
    text = stock(transformers.AutoModelForCausalLM, tmp_path / "out")
    assert [len(layer.mlp.experts.down_proj) for layer in layers_of(text)] == [4, 5]
    assert text.generate(torch.arange(3, 9)[None], max_new_tokens=3, do_sample=False).shape == (1, 9)
