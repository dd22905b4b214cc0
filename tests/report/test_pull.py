"""A version pulled for an engine: the form that it loads or a refusal in one line, and the profile for engines that mask."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moeflow.cli.pulled import _said
from moeflow.engines import engine_of
from moeflow.model.for_engine import prepare
from moeflow.run.pulling import Wanted
from moeflow.step import Context, step
from tests import running, tiny
from tests.model.test_dense import factored
from tests.report.conftest import call, last_json

PACKED = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 32}}}}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 6}


@step("evaluate.configured", version=1)
def configured(context: Context, *, config: dict[str, Any]) -> None:
    (context.out / "config.json").write_text(json.dumps(config))


def own(*layers: dict[str, Any], **more: Any) -> dict[str, Any]:
    return MIXTRAL | {"model_type": "moeflow_mixtral", "moeflow_layers": [*layers]} | more


@pytest.mark.parametrize(
    "engine, config, why",
    [
        ("vllm", own({"experts": 6}, {"experts": 4}), "have 4 and 6 experts.* --engine moeflow or vllm-moeflow, or .*fit"),
        ("sglang", own({"experts": 6, "skip": "ratio"}), "sglang has no skipping of experts"),
        ("llama.cpp", own({"experts": 6}, {"experts": 0, "gone": "moe"}), "no MoE block, which llama.cpp"),
        ("vllm", own({"experts": 6, "ranks": {"up": [2] * 6}}, {"experts": 4}), "layers have 4 and 6 experts"),
        ("llama.cpp", MIXTRAL | {"hidden_act": "gelu"}, "llama.cpp computes a mixtral otherwise: hidden_act is gelu"),
        ("vllm", {"model_type": "phimoe", "num_local_experts": 6}, "vllm computes a phimoe otherwise: .* no attention_bias"),
        ("sglang,ep=4", MIXTRAL, "ep=4 does not divide 6 experts"),
        ("transformers", own({"experts": 6}, quantization_config=PACKED), "transformers does not load moeflow's own format"),
    ],
)  # fmt: skip
def test_what_an_engine_loads_in_no_form_is_refused_before_a_file_is_copied(
    engine: str, config: dict[str, Any], why: str, tmp_path: Path
) -> None:
    store, made = running.store_in(tmp_path), configured(config=config)
    running.run(store, made)
    with pytest.raises(ValueError, match=why):
        Wanted.of(store, made.key, engine, dense=False)


@step("evaluate.copied", version=1)
def copied(context: Context, *, folder: str) -> None:
    for path in Path(folder).iterdir():
        (context.out / path.name).write_bytes(path.read_bytes())


def test_low_rank_matrices_are_multiplied_out_for_an_engine_without_a_kernel(tmp_path: Path) -> None:
    store, made = running.store_in(tmp_path), copied(folder=str(factored("glm4_moe", tmp_path)))
    running.run(store, made)
    assert Wanted.of(store, made.key, "vllm", dense=False).dense
    assert not Wanted.of(store, made.key, "vllm-moeflow", dense=False).dense


def test_low_rank_matrices_of_a_family_with_stacks_alone_are_refused_before_a_file_is_copied(tmp_path: Path) -> None:
    store, made = running.store_in(tmp_path), copied(folder=str(factored("gpt_oss", tmp_path)))
    running.run(store, made)
    with pytest.raises(ValueError, match="a gpt_oss has its experts in stacks.* vllm does not load moeflow's own format"):
        Wanted.of(store, made.key, "vllm", dense=False)
    assert not Wanted.of(store, made.key, "vllm-moeflow", dense=False).dense


def test_a_pruned_version_is_pulled_for_an_engine_with_its_bytes_in_memory(told: Path, tmp_path: Path) -> None:
    printed = last_json(call(told, "pull", "told_pipeline@1", tmp_path / "out", "--engine", "vllm", "--json"))
    weights = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert printed["engine"]["name"] == "vllm" and 0.9 * weights < printed["engine"]["resident"] < weights
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mixtral"


def test_what_is_packed_takes_its_unpacked_bytes_where_the_engine_unpacks(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MIXTRAL | {"quantization_config": PACKED}))
    matrix = {"_packed": torch.zeros(64, 8, dtype=torch.int32), "_scale": torch.zeros(64, 2, dtype=torch.bfloat16)}
    name, shape = "model.layers.0.block_sparse_moe.experts.0.w1.weight", {"_shape": torch.tensor([64, 64])}
    save_file(
        {name + end: t for end, t in (matrix | shape).items()} | {"lm_head.weight": torch.zeros(4, 4)}, folder / "model.safetensors"
    )
    assert prepare(folder, engine_of("transformers"))["resident"] == 64 * 64 * 2 + 64
    assert prepare(folder, engine_of("vllm"))["resident"] == 64 * 8 * 4 + 64 * 2 * 2 + 16 + 64


def test_a_deepseek_is_pulled_with_the_word_by_which_vllm_reads_its_bias(tmp_path: Path) -> None:
    folder = tiny.write("deepseek_v3", tmp_path / "model")
    assert "topk_method" not in json.loads((folder / "config.json").read_text())
    prepare(folder, engine_of("vllm"))
    assert json.loads((folder / "config.json").read_text())["topk_method"] == "noaux_tc"


def test_a_profile_is_the_original_and_the_experts_that_stay_in_both_dialects(told: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = last_json(call(told, "pull", "told_pipeline@1", out, "--profile", "--json"))
    assert printed["profiles"] == ["riy.json", "ascend.jsonl"]
    config = json.loads((out / "config.json").read_text())
    layers, count = config["num_hidden_layers"], config["num_local_experts"]
    copied = call(told, "pull", "told_pipeline@1", tmp_path / "again").stdout
    assert re.search(r": [0-9]+ files, [0-9.]+ KiB, of which [0-9.]+ KiB are weights, from checkpoint.assemble_as-", copied)
    last_json(call(told, "pull", "told_pipeline@1", tmp_path / "pruned", "--json"))
    history = json.loads((tmp_path / "pruned" / "moeflow.json").read_text())["layers"]
    kept = {entry["layer"]: entry["done"][-1]["keep"] for entry in history}
    assert len(kept) == layers and all(0 < len(of) < count for of in kept.values())
    riy = json.loads((out / "riy.json").read_text())
    assert riy["version"] == 1 and {tuple(pair) for pair in riy["pruned_experts"]} == {
        (layer, e) for layer, of in kept.items() for e in range(count) if e not in of
    }
    ranked = {int(i): every for line in (out / "ascend.jsonl").read_text().splitlines() for i, every in json.loads(line).items()}
    for layer, of in kept.items():
        assert ranked[layer][: len(of)] == of and sorted(ranked[layer]) == [*range(count)]


@pytest.mark.parametrize("words", [("--profile", "--engine", "vllm"), ("--converter", "x.py"), ("--engine", "vlm")])
def test_words_that_do_not_go_together_are_told(words: tuple[str, ...], told: Path, tmp_path: Path) -> None:
    done = call(told, "pull", "told_pipeline@1", tmp_path / "out", *words)
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("more, loss", [({}, False), ({"quantization_config": PACKED}, True)])
def test_it_is_said_that_a_gguf_has_no_packed_experts(more: dict[str, Any], loss: bool, tmp_path: Path) -> None:
    store, made = running.store_in(tmp_path), configured(config=MIXTRAL | more)
    running.run(store, made)
    wanted = Wanted.of(store, made.key, "llama.cpp", dense=False)
    lines = _said({"engine": {"resident": 8}, "gguf": {"file": "model.gguf", "bytes": 8}}, wanted, tmp_path)
    assert lines[-1].startswith("model.gguf: 8 bytes") and ("experts are unpacked in it" in lines[-1]) == loss


def converting(folder: Path, body: str) -> Path:
    """A converter that does this; `words` are its arguments."""
    made = folder / "convert_hf_to_gguf.py"
    made.write_text(f"import pathlib, sys\nwords = sys.argv[1:]\n{body}\n")
    return made


def test_a_converter_that_fails_says_why_and_leaves_the_folder(told: Path, tmp_path: Path) -> None:
    """It has taken the tokenizer before a file was copied, and not the weights."""
    refuses = converting(tmp_path, "'--vocab-only' in words or sys.exit('no room left')")
    done = call(told, "pull", "told_pipeline@1", tmp_path / "out", "--engine", "llama.cpp", "--converter", refuses)
    assert done.exit_code == 1 and "does not convert" in done.stderr and "no room left; the folder itself is whole" in done.stderr
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_tokenizer_that_the_converter_does_not_take_is_told_before_a_file_is_copied(told: Path, tmp_path: Path) -> None:
    refuses = converting(tmp_path, "'--vocab-only' in words and sys.exit('BPE pre-tokenizer was not recognized')")
    done = call(told, "pull", "told_pipeline@1", tmp_path / "out", "--engine", "llama.cpp", "--converter", refuses)
    assert done.exit_code == 2 and not (tmp_path / "out").exists()
    assert "does not take the tokenizer of" in done.stderr and "was not recognized; nothing was copied" in done.stderr


def test_the_converter_is_asked_for_the_precision_of_the_checkpoint(told: Path, tmp_path: Path) -> None:
    file = "pathlib.Path(words[words.index('--outfile') + 1])"
    writes = converting(tmp_path, f"{file}.write_text(' '.join(words))")
    done = call(told, "pull", "told_pipeline@1", tmp_path / "out", "--engine", "llama.cpp", "--converter", writes, "--json")
    told_of, made = last_json(done)["gguf"], tmp_path / "out" / "model.gguf"
    assert told_of == {"file": str(made), "bytes": made.stat().st_size}
    assert made.read_text().endswith("--outtype f32")
