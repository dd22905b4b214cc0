"""What the plug-in settles before a model is built, what it refuses, and that half precision runs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compressed import compress, load
from tests.serve import forms
from tests.serve.engine import PROMPTS, STEPS, agreement, greedy, served, told, way

pytest.importorskip("vllm", reason="needs vLLM; `make test-serve` makes an environment with it")
pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    return forms.skipping(forms.original("mixtral", folder / "original"), folder / "skipping")


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    return compress(forms.original("mixtral", folder / "original"), folder / "low-rank")


def test_the_general_way_is_eager_and_says_so(skipping: Path) -> None:
    with told() as lines, served(skipping, enforce_eager=False) as engine:
        assert engine.llm_engine.vllm_config.model_config.enforce_eager
    assert any("runs the general way: layer 0 skips experts" in line for line in lines)
    assert any("without CUDA graphs" in line for line in lines)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"enable_expert_parallel": True}, "--enable-expert-parallel is vLLM's own division .*; leave it out"),
        ({"hf_overrides": {"moeflow_way": "native"}}, "'native' cannot be: layer 0 skips experts; leave moeflow_way out"),
        ({"hf_overrides": {"moeflow_way": "fast"}}, "moeflow_way='fast' .* write one of auto, general, native"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_built(skipping: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says), served(skipping, **options):
        pass


@pytest.mark.parametrize(
    "options, says",
    [
        ({"enable_expert_parallel": True}, "low-rank experts .* --enable-expert-parallel .*leave it out"),
        (
            {"hf_overrides": {"moeflow_way": "native"}, "tensor_parallel_size": 2},
            "one process alone, .* --tensor-parallel-size is 2",
        ),
    ],
)
def test_low_rank_experts_are_not_divided_the_native_way(low_rank: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says), served(low_rank, **options):
        pass


def test_low_rank_experts_run_in_a_compiled_model(low_rank: Path) -> None:
    with served(low_rank, enforce_eager=False) as engine:
        assert way(engine) == "native" and not engine.llm_engine.vllm_config.model_config.enforce_eager
        same, apart = agreement(engine, low_rank)
    assert same == len(PROMPTS) * STEPS and apart < 5e-4


@torch.inference_mode()
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("form", ["low_rank", "skipping", "packed"])
def test_in_bf16_it_is_as_near_to_fp32_as_transformers_is(family: str, form: str, tmp_path: Path) -> None:
    """Of the likeliest first tokens; behind them the texts part."""
    made = forms.FORMS_OF[form](forms.original(family, tmp_path / "original"), tmp_path / form)
    reference = forms.plain(made, tmp_path / "plain") if form == "packed" else made
    exact, half = load(reference), load(reference, dtype=torch.bfloat16)
    with served(made, dtype="bfloat16") as engine:
        assert way(engine) == ("native" if form == "low_rank" else "general")
        written = greedy(engine)
    for prompt, one in zip(PROMPTS, written, strict=True):
        logs, near = (m(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1) for m in (exact, half))
        allowed = 3 * float((logs - near).abs().max()) + 0.2
        assert all(abs(float(logs[i]) - likeliest.logprob) < allowed for i, likeliest in one.logprobs[0].items())
