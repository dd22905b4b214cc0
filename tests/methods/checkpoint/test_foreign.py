"""What lies in a checkpoint's folder and is no part of the model never gets into the result unnoticed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moeflow.cli import app
from moeflow.methods.graph import Model
from moeflow.step import Step
from tests import layouts, running, tiny
from tests.making import folder
from tests.methods.checkpoint.test_pinned import sharded
from tests.models import pulled
from tests.running import model_in, store_in

PIPELINE = Path(__file__).parents[2] / "bad_inputs_pipeline.py"
BUFFER = "model.layers.1.self_attn.rotary_emb.inv_freq"
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write("mixtral", tmp_path_factory.mktemp("good") / "model", num_hidden_layers=2)


@pytest.fixture
def source(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def notes(model: Model) -> str:
    return " | ".join(model.rest.notes)


def keys(model: Model) -> list[str]:
    return [s.key for s in (model.rest, *model.layers)]


def beside(path: Path, **tensors: torch.Tensor) -> None:
    """A safetensors file that belongs to nobody."""
    save_file(tensors or {"layers.0.attention.wq.weight": torch.ones(2, 2)}, path)


def also(path: Path, **tensors: torch.Tensor) -> None:
    """The file holds these tensors, too."""
    whole = load_file(path) | tensors
    save_file(whole, path, metadata={"format": "pt"})


FOREIGN = {
    "consolidated.safetensors": "consolidated.safetensors",
    "consolidated.00.pth": "consolidated.00.pth",
    "model.fp16.safetensors": "model.fp16.safetensors",
    "lora.safetensors": "lora.safetensors",
    "optimizer.pt": "optimizer.pt",
    "scheduler.pt": "scheduler.pt",
    "rng_state_0.pth": "rng_state_0.pth",
    "training_args.bin": "training_args.bin",
    "trainer_state.json": "trainer_state.json",
    "pytorch_model.bin": "pytorch_model.bin",
    "model.gguf": "model.gguf",
    "README.md": "README.md",
    "train.py": "train.py",
    "global_step100/mp_rank_00_model_states.pt": "global_step100/ (1 file)",
    "checkpoint-500/model.safetensors": "checkpoint-500/ (1 file)",
    "original/tokenizer.model": "original/ (1 file)",
}


@pytest.mark.parametrize("several", [False, True], ids=["one file", "shards"])
def test_foreign_files_are_named_in_a_note_and_neither_read_nor_in_the_result(several: bool, source: Path, tmp_path: Path) -> None:
    if several:
        sharded(source)
    before = model_in(source)
    assert notes(before) == ""
    for name in FOREIGN:
        (source / name).parent.mkdir(exist_ok=True)
        beside(source / name) if name.endswith(".safetensors") else (source / name).write_text("{}")
    (source / ".gitattributes").write_text("")
    model = model_in(source)
    assert notes(model).startswith("left where it is, as no part of the model: ")
    assert all(words in notes(model) for words in FOREIGN.values()) and ".gitattributes" not in notes(model)
    assert keys(model) == keys(before), "what is not read is in no key"
    names = {p.name for p in pulled(store_in(tmp_path), model, tmp_path).iterdir()}
    assert names == {"config.json", "generation_config.json", "moeflow.json", "model.safetensors.index.json"} | {
        f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)
    }


def test_a_plan_and_a_run_tell_what_stays_behind(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (source / "optimizer.pt").write_bytes(b"x")
    also(source / "model.safetensors", **{BUFFER: torch.ones(4)})
    words = [str(PIPELINE), "--store", str(tmp_path / "store"), "-p", f"model={source}"]
    told = "checkpoint.rest: left where it is, as no part of the model: optimizer.pt"
    planned = CliRunner().invoke(app, ["plan", *words], catch_exceptions=False)
    assert told in planned.stdout and f"checkpoint.rest: left out, as transformers leaves them out: {BUFFER}" in planned.stdout
    assert told in CliRunner().invoke(app, ["run", *words], catch_exceptions=False).stderr


@pytest.mark.parametrize("family", tiny.families())
def test_buffers_that_transformers_ignores_are_left_out_and_named(family: str, tmp_path: Path) -> None:
    source = tiny.write(family, tmp_path / "model")
    for name in (BUFFER, "model.rotary_emb.inv_freq"):
        also(source / "model.safetensors", **{name: torch.ones(4)})
    model = model_in(source)
    assert "model.rotary_emb.inv_freq" in notes(model) and BUFFER in notes(model)
    held = {n for s in (model.rest, *model.layers) for n in s.spec.output.tensors}
    assert held and not any(n.endswith("inv_freq") for n in held)


@pytest.mark.parametrize("name", ["self_attn.bias", "self_attn.masked_bias", "self_attn.rotary_emb.original_inv_freq"])
def test_what_transformers_ignores_in_other_families_only_is_refused(name: str, source: Path) -> None:
    also(source / "model.safetensors", **{f"model.layers.1.{name}": torch.ones(4)})
    with pytest.raises(ValueError, match=rf"layer 1 has model.layers.1.{name}, which config.json leaves no place for"):
        model_in(source)


@pytest.mark.parametrize("name", ["attn.bias", "attention.masked_bias", "rotary_emb.inv_freq", "self_attn.rotary_emb.inv_freq"])
def test_nothing_beside_a_text_model_is_ignored(name: str, tmp_path: Path) -> None:
    """Whatever it is called: a vision tower's bias is one of its weights."""
    source, name = layouts.write("qwen3_vl_moe", tmp_path / "model"), f"model.visual.blocks.0.{name}"
    buffer = BUFFER.replace("model.", "model.language_model.")
    also(source / "model.safetensors", **{name: torch.ones(4), buffer: torch.ones(4)})
    model = layouts.model_in(source, layouts.KINDS["qwen3_vl_moe"].found)
    assert buffer in notes(model) and name not in notes(model)
    assert torch.equal(layouts.raw(pulled(store_in(tmp_path), model, tmp_path))[name], torch.ones(4))


def test_transformers_loads_a_result_without_a_remark_whose_source_had_buffers(source: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(source).state_dict()
    also(source / "model.safetensors", **{BUFFER: torch.ones(4)})
    out = pulled(store_in(tmp_path), model_in(source), tmp_path)
    load: Any = AutoModelForCausalLM.from_pretrained
    made, info = load(out, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(plain[n], t) for n, t in made.state_dict().items())


def adapter(at: Path, base: str = "org/base") -> None:
    beside(at / "adapter_model.safetensors", **{LORA: torch.ones(2, 2)})
    (at / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))


@pytest.mark.parametrize("several", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("less", ["", "adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_beside_the_weights_is_refused_with_the_ways_out(less: str, several: bool, source: Path) -> None:
    if several:
        sharded(source)
    adapter(source)
    if less:
        (source / less).unlink()
    with pytest.raises(
        ValueError, match=r"holds an adapter beside its weights \(adapter_.*-p adapter=merge\), or move it away"
    ) as told:
        model_in(source)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("config", [False, True], ids=["alone", "with config.json"])
def test_a_folder_with_nothing_but_an_adapter_says_which_base_it_wants(config: bool, good: Path, tmp_path: Path) -> None:
    at = folder(tmp_path / "adapter")
    adapter(at, "org/the-base")
    if config:
        shutil.copy(good / "config.json", at)
    with pytest.raises(ValueError, match="adapter holds an adapter of org/the-base and no weights.*-p model=org/the-base"):
        model_in(at)


def weights(at: Path, change: Callable[[str], str]) -> None:
    whole = {change(n): t for n, t in load_file(at / "model.safetensors").items()}
    save_file(whole, at / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda n: n.replace("q_proj.", "q_proj.base_layer."), "base_layer.weight, which is an adapter that is not merged"),
        (lambda n: f"base_model.model.{n}", "which is PEFT's wrapping: call merge_and_unload"),
        (lambda n: f"_orig_mod.{n}", "which is the wrapping of torch.compile"),
        (lambda n: n.replace("self_attn.", "_fsdp_wrapped_module.self_attn."), "which is the wrapping of FSDP"),
        (lambda n: f"module.{n}", "which is the wrapping of torch's or DeepSpeed's data parallelism"),
    ],
)
def test_a_model_that_was_saved_in_a_training_s_wrapping_is_refused_by_its_name(
    change: Callable[[str], str], says: str, source: Path
) -> None:
    weights(source, change)
    with pytest.raises(ValueError, match=says):
        model_in(source)


def test_weights_that_are_there_twice_are_refused_because_readers_differ_in_which_they_take(source: Path) -> None:
    shutil.copy(source / "model.safetensors", source / "whole")
    sharded(source)
    (source / "whole").rename(source / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds its weights twice: in model.safetensors, .*index.json; delete one of them"):
        model_in(source)


def test_weights_in_a_file_that_only_config_json_names_are_refused(source: Path) -> None:
    config = json.loads((source / "config.json").read_text()) | {"transformers_weights": "other.safetensors"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names 'other.safetensors' as transformers_weights; call that file model.safetensors"):
        model_in(source)


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "original/consolidated-00001.safetensors", "checkpoint-5/model.safetensors"]
)
def test_weights_only_in_their_maker_s_form_or_a_folder_below_are_refused_by_name(name: str, source: Path) -> None:
    (source / name).parent.mkdir(exist_ok=True)
    (source / "model.safetensors").rename(source / name)
    with pytest.raises(ValueError, match=rf"holds no weights that transformers reads: {name} has its maker's own form"):
        model_in(source)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64])
def test_a_weight_of_whole_numbers_is_refused_at_plan_time(dtype: torch.dtype, source: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    also(source / "model.safetensors", **{name: torch.ones(32, 32, dtype=dtype)})
    with pytest.raises(ValueError, match=rf"{name} at .* has dtype \w+, which no weight is computed in; dequantize"):
        model_in(source)


def test_notes_stay_with_a_step_wherever_it_runs_and_are_in_no_key(source: Path) -> None:
    step = model_in(source).rest
    noted: Step = step.noting("one", "two").on(cpus=3)
    assert noted.notes == ("one", "two") and noted.key == step.key and running.alone(noted).notes == noted.notes
