"""The small trained Mixtral that the project ships, compressed, in vLLM: its log-probabilities are nearer than a random model's."""

from pathlib import Path

import pytest
import torch

from tests.compressed import compress, load
from tests.serve import forms
from tests.serve.engine import PROMPTS, STEPS, agreement, served

pytest.importorskip("vllm", reason="needs vLLM; `make test-serve` makes an environment with it")
pytestmark = pytest.mark.serve

SMALL = Path(__file__).parents[2] / "models" / "mixtral-small"
MADE = {"counts": forms.counts, "low_rank": compress, "skipping": forms.skipping}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forms.heads_of_32(SMALL, tmp_path_factory.mktemp("trained") / "wide")


@torch.inference_mode()
def test_wider_heads_compute_the_same(trained: Path) -> None:
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(load(trained)(ids).logits, load(SMALL)(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", MADE)
def test_a_trained_model_is_nearer(trained: Path, form: str, tmp_path: Path) -> None:
    made = MADE[form](trained, tmp_path / form)
    with served(made) as engine:
        same, apart = agreement(engine, made)
    assert same == len(PROMPTS) * STEPS and apart < 1e-4, f"{same} tokens, {apart} apart"
