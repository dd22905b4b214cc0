"""Packed experts, alike in all layers: they stay packed where vLLM has a kernel for them on this machine, or it says why not."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.serve import forms
from tests.serve.engine import PROMPTS, STEPS, agreement, served, told, way

pytest.importorskip("vllm", reason="needs vLLM; `make test-serve` makes an environment with it")
pytestmark = pytest.mark.serve

ALL = len(PROMPTS) * STEPS
NO_ZEN = ("phimoe", "deepseek_v3")
"""The families whose routers AMD's kernel does not know."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forms.original("mixtral", tmp_path_factory.mktemp("mixtral") / "original")


def kernel_here() -> bool:
    """Whether vLLM has a kernel of packed experts on this processor: AMX, or AMD's library."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4
    from vllm.model_executor.layers.fused_moe.experts.zentorch_moe import ZentorchExpertsInt4

    return CPUExpertsInt4._supports_current_device() or ZentorchExpertsInt4._supports_current_device()


@pytest.fixture(scope="module")
def on_zen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What every family, packed alike and with differing counts, does where vLLM has AMD's library, in a process of their own: one
    process has one platform."""
    if importlib.util.find_spec("zentorch") is None or "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("AMD's zentorch is not installed, or this processor has no AVX-512")
    folders = {}
    for family in tiny.FAMILIES:
        out = tmp_path_factory.mktemp(family)
        made = forms.packed_counts(forms.original(family, out / "original"), out / "packed")
        folders[family] = made, forms.plain(made, out / "plain")
    words = [sys.executable, "-m", "tests.serve.on_zen", *(str(f) for both in folders.values() for f in both)]
    root = Path(__file__).parents[2]
    done = subprocess.run(words, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(folders, lines, strict=True))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_experts_of_differing_counts_run_in_a_kernel_of_the_engine_or_it_is_said_that_it_has_none(
    family: str, on_zen: dict[str, dict[str, Any]]
) -> None:
    """In bf16 with products in 8 bits, so that not all tokens are the same, nor are they where experts are unpacked."""
    seen = on_zen[family]
    (said,) = (line for line in seen["said"] if " way: " in line)
    if family in NO_ZEN:
        assert seen["way"] == "general" and not seen["kernels"] and "vLLM has no kernel here for experts of 4 bits" in said
        return
    assert seen["way"] == "native" and {*seen["kernels"]} == {"ZentorchExpertsInt4"} and "vLLM has a kernel for them" in said
    assert seen["same"] > 0.75 * ALL, f"{seen['same']} of {ALL} tokens, {seen['apart']} apart"


def test_in_fp32_they_are_unpacked_and_computed_as_transformers_computes_them(source: Path, tmp_path: Path) -> None:
    made = forms.packed_counts(source, tmp_path / "packed")
    with told() as lines, served(made) as engine:
        assert way(engine) == "general"
        same, apart = agreement(engine, forms.plain(made, tmp_path / "plain"))
    assert same == ALL and apart < 5e-4
    assert any("general way: vLLM's kernels of packed experts on a processor compute in bfloat16, and float32" in i for i in lines)


def test_the_native_way_is_refused_by_name_where_there_is_no_kernel(source: Path, tmp_path: Path) -> None:
    made = forms.packed_counts(source, tmp_path / "packed")
    with pytest.raises(ValueError, match="'native' cannot be: vLLM's kernels .* float32 is asked for; leave moeflow_way out"):
        served(made, hf_overrides={"moeflow_way": "native"}).__enter__()


def test_in_bf16_vllm_chooses_its_kernel_or_it_is_said_that_it_has_none(source: Path, tmp_path: Path) -> None:
    """The kernels compute in 8 bits, so that not all tokens are the same."""
    made = forms.packed_counts(source, tmp_path / "packed")
    with told() as lines, served(made, dtype="bfloat16") as engine:
        runs = way(engine)
        assert runs == ("native" if kernel_here() else "general")
        (unpacked,) = engine.apply_model(lambda model: all(p.is_floating_point() for p in model.parameters()))
        assert unpacked == (runs == "general")
        same, _ = agreement(engine, forms.plain(made, tmp_path / "plain"))
    assert same > ALL / 2
    said = "and vLLM has a kernel for them" if runs == "native" else "vLLM has no kernel here for experts of 4 bits"
    assert any(f"runs the {runs} way: " in line and said in line for line in lines)


def test_one_scale_a_row_has_no_kernel_on_a_processor(source: Path, tmp_path: Path) -> None:
    made = forms.packed_counts(source, tmp_path / "packed", group=0)
    with told() as lines, served(made, dtype="bfloat16") as engine:
        assert way(engine) == "general"
    assert any("general way: vLLM" in line for line in lines)
