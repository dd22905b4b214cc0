"""Every form of every family writes in vLLM what it writes in transformers."""

from pathlib import Path

import pytest

from tests import tiny
from tests.serve import forms
from tests.serve.engine import PROMPTS, STEPS, agreement, served, told, way

pytest.importorskip("vllm", reason="needs vLLM; `make test-serve` makes an environment with it")
pytestmark = pytest.mark.serve

ALL = len(PROMPTS) * STEPS
NATIVE = ("counts", "low_rank")
"""The forms that run in vLLM's own classes."""
NEAR = 5e-4
"""How far log-probabilities of random models may be apart, in fp32."""


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forms.original(request.param, tmp_path_factory.mktemp(request.param) / "original")


@pytest.mark.parametrize("form", forms.FORMS_OF)
def test_it_writes_what_it_writes_in_transformers(source: Path, form: str, tmp_path: Path) -> None:
    made = forms.FORMS_OF[form](source, tmp_path / form)
    reference = forms.plain(made, tmp_path / "plain") if form in ("packed", "added") else made
    with told() as lines, served(made) as engine:
        same, apart = agreement(engine, reference)
        assert same == ALL and apart < NEAR, f"{same} of {ALL} tokens, {apart} apart"
        expected = "native" if form in NATIVE else "general"
        assert way(engine) == expected
    assert any(f"runs the {expected} way: " in line for line in lines)


@pytest.mark.parametrize("form", NATIVE)
def test_what_runs_the_native_way_runs_the_general_way_where_it_is_asked_for(source: Path, form: str, tmp_path: Path) -> None:
    made = forms.FORMS_OF[form](source, tmp_path / form)
    with served(made, hf_overrides={"moeflow_way": "general"}) as engine:
        assert way(engine) == "general" and agreement(engine, made) == (ALL, pytest.approx(0, abs=NEAR))
