"""What the plug-in counts while vLLM serves is what transformers routes the same tokens to: both ways, and in vLLM's own class."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moeflow.arch import Family
from moeflow.model.router import Router
from moeflow.model.skeleton import layers_of
from moeflow.serve import plugin, switch, traffic
from tests.compressed import compress, load
from tests.serve import forms
from tests.serve.engine import PROMPTS, greedy, served, told, way

pytest.importorskip("vllm", reason="needs vLLM; `make test-serve` makes an environment with it")
pytestmark = pytest.mark.serve

SMALL = Path(__file__).parents[2] / "models" / "mixtral-small"
MADE = {
    "stock": (None, "stock"),
    "counts": (forms.counts, "native"),
    "low-rank": (compress, "native"),
    "asked": (compress, "general"),
    "skipping": (forms.skipping, "general"),
}
"""How a checkpoint is made, and the way that it runs."""


@torch.inference_mode()
def routed(folder: Path, texts: list[list[int]]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """By layer, how often transformers chooses each expert and each two together, and the sums of their weights."""
    model = load(folder)
    family = Family.of(model.config.to_dict())
    sums: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(layer: int, logits_TE: torch.Tensor) -> None:
        weights_Tk, index_Tk = Router.of(family, logits_TE.shape[1]).choose(logits_TE)
        dense_TE = torch.zeros(logits_TE.shape).scatter_(1, index_Tk, weights_Tk.float()).double().numpy()
        chosen_TE = (dense_TE > 0).astype(np.int64)
        before = sums.get(layer, (0, 0))
        sums[layer] = before[0] + chosen_TE.T @ chosen_TE, before[1] + dense_TE.sum(0)

    for i in family.moe_layers:
        router = layers_of(model)[i].get_submodule(f"{family.arch.block}.{family.arch.block_router}")
        router.register_forward_hook(lambda _, args, out, i=i: add(i, out[0]))
    for ids in texts:
        model(torch.tensor([ids]))
    return sums


@pytest.mark.parametrize("form", MADE)
def test_what_is_counted_is_what_transformers_chooses(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = forms.heads_of_32(SMALL, tmp_path / "wide")
    make, runs = MADE[form]
    folder = make(folder, tmp_path / form) if make else folder
    file = tmp_path / "traffic.json"
    monkeypatch.setenv(switch.VARIABLE, str(file))
    plugin.register()  # as vLLM does where it starts
    asked = {"hf_overrides": {"moeflow_way": runs}} if make else {}
    with told() as lines, served(folder, enforce_eager=False, **asked) as engine:
        assert way(engine) == runs and engine.llm_engine.vllm_config.model_config.enforce_eager
        written = greedy(engine)
    traffic.write()
    assert any(str(file) in line for line in lines)
    said = json.loads(file.read_text())
    assert said["model_type"] == "mixtral" and said["top_k"] == 2
    texts = [[*p, *one.token_ids][:-1] for p, one in zip(PROMPTS, written, strict=True)]  # the last is never an input
    for layer, (together, weights) in routed(folder, texts).items():
        found = said["layers"][str(layer)]
        assert found["tokens"] == sum(map(len, texts))
        assert found["counts"] == together.diagonal().tolist() and found["together"] == together.tolist()
        np.testing.assert_allclose(found["weights"], weights, rtol=1e-4)


def test_a_run_before_is_not_written_over_and_a_file_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    assert traffic.free(tmp_path / "a.json") == tmp_path / "a-2.json"
    with pytest.raises(ValueError, match="cannot be written .*name a file in a folder that is there"):
        traffic.Recorder(tmp_path / "absent" / "a.json", {})
