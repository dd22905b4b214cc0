"""The published compressions that end with a fine-tuning, each on a small model of its family, by DeepSpeed in this process."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeflow.arch import MAIN
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import Folder, read_config
from moeflow.run import pipeline
from moeflow.step import upstream
from tests import running, tiny
from tests.pipelines import words

PIPELINES = Path(__file__).parents[2] / "pipelines"
RECON = ["counts.importance=recon", "decomposition.importance=recon"]
MOEI2 = [*words.TEXT, *words.RECORDED, *words.GENETIC, *RECON]
DISTILLED = ["tune=compressed_experts", "tune.loss=kl"]


@pytest.mark.parametrize(
    ("name", "family", "more", "changed"),
    [
        ("mixtral_moei2", "mixtral", MOEI2, (".experts.", ".self_attn.")),
        pytest.param(
            "mixtral",
            "mixtral",
            [*words.TEXT, "tune=lora", "skipping=median"],
            (".experts.", ".self_attn."),
            marks=pytest.mark.slow,
        ),
        pytest.param("olmoe", "olmoe", [], (".experts.compressed.", ".mlp.gate.", "embed_tokens"), marks=pytest.mark.slow),
        pytest.param("phimoe", "phimoe", DISTILLED, (".experts.compressed.",), marks=pytest.mark.slow),
    ],
)
def test_a_pipeline_trains_what_it_says_and_the_result_loads(
    name: str, family: str, more: list[str], changed: tuple[str, ...], tmp_path: Path
) -> None:
    source, matrix = tiny.write(family, tmp_path / "model"), running.matrix_of(tmp_path).spec
    small = [f"tokens={matrix}"] if family == "mixtral" else [f"heldout={matrix}"]
    build = pipeline.load(PIPELINES / f"{name}.py")
    small += [f"model={source}", f"tune.text={matrix}", *words.TUNED, *words.HELD_OUT]
    target = running.alone(pipeline.call(build, [*small, *more]))
    store = running.store_in(tmp_path)
    running.run(store, target)
    (before,) = {i for s in upstream([target]) if s.name == "finetune.train" for i in s.inputs[:1]}
    artifacts = [store.artifact(key) for key in (before.key, target.key)]
    old, new = (Tensors(a.folder()) for a in artifacts)
    different = {n for n in new if n in old and not torch.equal(old[n], new[n])}
    for part in changed:
        assert any(part in n for n in different), f"no {part} among {sorted(different)}"
    if more == DISTILLED:
        assert all(".experts.compressed." in n for n in different)
    if family != "mixtral":
        assert read_config(Folder(artifacts[1].folder()))[MAIN] == 1
    model = AutoModelForCausalLM.from_pretrained(artifacts[1].folder()).eval()
    assert torch.isfinite(model(torch.arange(3, 12)[None]).logits).all()
    report = running.reports(store, target)
    assert report["training loss"]["original"] > 0
    assert json.loads((artifacts[1].folder() / "config.json").read_text())["model_type"].startswith("moeflow_")
