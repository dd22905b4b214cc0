"""The table of engines: every line has a source, and what a line says is what a request is held to."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import moeflow
from moeflow.cli import app
from moeflow.engines import ENGINES, Form, Packing, engine_of, form_of
from moeflow.methods.fit.options import Offers
from tests import running

WHOLE, FOUR = Packing(0), Packing(4, 32)
PLAN = ("plan", "mixtral_unified", "--runner", "process", "-p", f"model={running.SMALL}", "-p", "trim=none")
TEXTS = ("-p", "tokens=python:stdlib/a*.py", "-p", "heldout=python:stdlib/t*.py", "-p", "calibration.sequences=8")
SHORT = ("-p", "calibration.length=64", "-p", "heldout.sequences=4", "-p", "heldout.length=64")


@pytest.mark.parametrize("name", ENGINES)
def test_every_line_of_the_table_has_a_source(name: str) -> None:
    engine = ENGINES[name]
    lines = {f.name for f in dataclasses.fields(engine)} - {"name", "sources", "kernels", "tp", "ep", "model_type"}
    assert set(engine.sources) == lines | ({"kernels"} if engine.kernels else set())
    assert all(len(source) > 20 for source in engine.sources.values())


@pytest.mark.parametrize(
    "word, form, why",
    [
        ("vllm", Form("mixtral", frozenset({8, 6})), "layers have 6 and 8 experts, and vllm has one number"),
        ("vllm", Form("mixtral", frozenset({8}), differ="counts"), "as many experts as a run decides"),
        ("vllm", Form("mixtral", frozenset({8}), ranks=True), "low-rank, for which vllm has no kernel"),
        ("sglang", Form("mixtral", frozenset({8}), gone=True), "no MoE block, which sglang cannot leave out"),
        ("vllm", Form("olmoe", frozenset({8}), routing="skipping of experts"), "vllm has no skipping of experts"),
        ("vllm", Form("mixtral", frozenset({8}), packings=frozenset({Packing(3, 32)})), "3 bits.* it runs 8 and 4"),
        ("vllm", Form("mixtral", frozenset({8}), packings=frozenset({Packing(4, 16)})), "16 weights, and vllm.* or one a row"),
        ("vllm", Form("mixtral", frozenset({8}), packings=frozenset({WHOLE, FOUR})), "differ in how .*whole and 4 bits with"),
        ("vllm", Form("mixtral", frozenset({8}), packings=frozenset({Packing(8, 32, False)})), "no zero points.* only at 4"),
        ("sglang", Form("mixtral", frozenset({8}), packings=frozenset({Packing(4, 32, False)})), "sglang reads no zero points"),
        ("llama.cpp", Form("mixtral", frozenset({8}), packings=frozenset({Packing(4)})), "one scale a row, and llama.cpp"),
        ("vllm", Form("deepseek_v4", frozenset({144})), "no kernel for 144 experts of a deepseek_v4 .*51521.*; take 128"),
        ("vllm-moeflow", Form("deepseek_v4", frozenset({160})), "no kernel for 160 experts"),
        ("sglang,ep=4", Form("olmoe", frozenset({54})), "ep=4 does not divide 54 experts .*; take 52 or 56"),
        ("vllm-moeflow,ep=2", Form("mixtral", frozenset({8, 6}), ranks=True), "low-rank, for which vllm-moeflow,ep=2"),
        ("vllm-moeflow,ep=2", Form("mixtral", frozenset({8, 6}), packings=frozenset({FOUR})), "4 bits, which vllm-moeflow,ep=2"),
        ("vllm,tp=5", Form("olmoe", frozenset({64}), 1024), "tp=5 does not divide the 1024 inner units"),
        ("vllm,tp=4", Form("olmoe", frozenset({64}), 768, packings=frozenset({Packing(4, 128)})), "leaves 192 .* groups of 128"),
    ],
)  # fmt: skip
def test_what_an_engine_does_not_run_is_said_in_one_line(word: str, form: Form, why: str) -> None:
    (said,) = form.why_not(engine_of(word))
    assert "\n" not in said
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(said)


@pytest.mark.parametrize("name", ENGINES)
def test_what_every_engine_runs_is_refused_by_none(name: str) -> None:
    assert not Form("mixtral", frozenset({6}), 14336).why_not(engine_of(name, tp=2, ep=2))
    assert not Form("deepseek_v4", frozenset({192}), 2048).why_not(engine_of(name))


@pytest.mark.parametrize(
    "word, why", [("vlm", "choose one of transformers"), ("vllm,dp=2", "'dp=2' is no parallel size"), ("vllm,tp=0", "no parallel")]
)
def test_a_word_that_is_no_engine_is_told(word: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        engine_of(word)


@pytest.mark.parametrize(
    "config, why",
    [
        ({"model_type": "mixtral", "hidden_act": "gelu"}, "hidden_act is gelu, and its experts have silu"),
        ({"model_type": "moeflow_mixtral", "sliding_window": 64, "max_position_embeddings": 512}, "sliding_window is 64"),
        ({"model_type": "qwen2_moe", "norm_topk_prob": True}, "norm_topk_prob is True, which it takes to be False"),
        ({"model_type": "qwen2_moe", "mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]"),
        ({"model_type": "qwen2_moe", "decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"model_type": "qwen3_moe"}, "norm_topk_prob is False, which it takes to be True"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ({"model_type": "olmoe", "rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"),
        (
            {"model_type": "olmoe", "num_attention_heads": 4, "num_key_value_heads": 2},
            "num_key_value_heads is 2, which it takes to be 4",
        ),
        ({"model_type": "phimoe"}, "weighs two experts by softmax"),
        ({"model_type": "deepseek_v2", "n_group": 8}, "n_group is 8, and it ranks groups by their two best"),
        ({"model_type": "deepseek_v3", "rope_interleave": False}, "rope_interleave is False"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused_there_alone(config: dict[str, object], why: str) -> None:
    form = form_of(config)
    assert not form.why_not(engine_of("moeflow"))
    (said,) = form.why_not(engine_of("llama.cpp"))
    with pytest.raises(AssertionError, match=f"llama.cpp computes a .* otherwise: .*{why}"):
        raise AssertionError(said)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mixtral", "sliding_window": 512, "max_position_embeddings": 512},
        {"model_type": "qwen2_moe", "sliding_window": 64, "max_position_embeddings": 512, "norm_topk_prob": False},
        {"model_type": "qwen3_moe", "norm_topk_prob": True, "mlp_only_layers": []},
        {"model_type": "deepseek_v2", "n_group": 1},
        {"model_type": "glm4_moe"},
    ],
)
def test_what_llama_cpp_computes_as_transformers_does_is_not_refused(config: dict[str, object]) -> None:
    assert not form_of(config).why_not(engine_of("llama.cpp"))


def test_a_form_is_read_from_a_config_json_in_either_format() -> None:
    weights = {"num_bits": 4, "group_size": 32, "symmetric": False}
    plain = {"model_type": "mixtral", "num_local_experts": 6, "intermediate_size": 48}
    packed = plain | {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": weights}}}}
    own = plain | {"model_type": "moeflow_mixtral", "moeflow_layers": [{"experts": 6}, {"experts": 4, "ranks": {"up": [3]}}, {}]}
    assert form_of(plain) == Form("mixtral", frozenset({6}), 48)
    assert form_of(packed).packings == frozenset({Packing(4, 32, False)})
    assert form_of(own) == Form("mixtral", frozenset({4, 6}), 48, ranks=True)


def test_groups_that_an_engine_has_no_kernel_for_are_refused_where_they_are_asked_for() -> None:
    with pytest.raises(ValueError, match="group=16: vllm has kernels for groups of 32, 64, 128"):
        Offers(engine="vllm", group=16)
    Offers(engine="vllm", group=16, bits=(3,))  # which it would not run anyway: nothing is packed


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        app([*words])
    return int(str(end.value.code)), capsys.readouterr().err


@pytest.mark.parametrize(
    "asked, why",
    [
        (("slim=gptq", "slim.group=16"), "a scale for 16 weights"),
        (("slim=gptq", "slim.bits=3", "slim.group=32"), "3 bits, which vllm does not run"),
        (("order=decompose", "decompose.multiple=1"), "low-rank, for which vllm has no kernel.* --engine moeflow or vllm-moeflow"),
    ],
)
def test_a_plan_refuses_what_its_engine_does_not_run(
    asked: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [
        *PLAN,
        *TEXTS,
        *SHORT,
        "--store",
        str(tmp_path / "store"),
        *(w for word in asked for w in ("-p", word)),
        "--engine",
        "vllm",
    ]
    code, error = said(capsys, *words)
    assert code == 2 and error.count("\n") == 1 and error.startswith("error: --engine vllm: ")
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(error)


def test_a_plan_refuses_what_its_engine_computes_otherwise(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = shutil.copytree(running.SMALL, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"sliding_window": 64}))
    words = [word.replace(str(running.SMALL), str(model)) for word in (*PLAN, *TEXTS, *SHORT)]
    asked = ("-p", "slim=gptq", "-p", "slim.group=32", "--store", str(tmp_path / "store"), "--engine", "llama.cpp")
    code, error = said(capsys, *words, *asked)
    assert code == 2 and "llama.cpp computes a mixtral otherwise: sliding_window is 64" in error


def test_a_fit_is_held_to_its_engine_as_a_plan_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """On the command line, from Python, and by the pipeline's own option."""
    model, store = shutil.copytree(running.SMALL, tmp_path / "model"), str(tmp_path / "store")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"sliding_window": 64}))
    why = "--engine llama.cpp: llama.cpp computes a mixtral otherwise: sliding_window is 64"
    for words in (("fit", str(model), "--ratio", "0.3", "--engine", "llama.cpp"), ("run", "fit", "-p", "budget.ratio=0.3")):
        given = ("-p", f"model={model}", "-p", "offers.engine=llama.cpp") if words[0] == "run" else ()
        code, error = said(capsys, *words, *given, *TEXTS, *SHORT, "--store", store)
        assert code == 2 and error.count("\n") == 1 and why in error
    texts = {"tokens": "python:stdlib/a*.py", "heldout": {"texts": "python:stdlib/t*.py", "length": 64}}
    with pytest.raises(ValueError, match=why):
        moeflow.fit(model, ratio=0.3, engine="llama.cpp", store=store, progress=False, calibration={"length": 64}, **texts)


def test_a_plan_that_its_engine_runs_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [
        *PLAN,
        *TEXTS,
        *SHORT,
        "--store",
        str(tmp_path / "store"),
        "-p",
        "slim=gptq",
        "-p",
        "slim.group=32",
        "--engine",
        "vllm",
    ]
    code, error = said(capsys, *words)
    assert (code, error) == (0, "")
    code, error = said(capsys, *words, "--tp", "7")
    assert code == 2 and "tp=7 does not divide" in error
    code, error = said(capsys, *words[:-2], "--ep", "2")
    assert code == 2 and "say which, as in --engine vllm" in error
