"""The published compressions as they stand, each on a small model of its family."""

import inspect
import json
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moeflow.arch import Family
from moeflow.model.formats import format_of
from moeflow.model.layout import Folder, headers, read_config
from moeflow.run import pipeline
from moeflow.step import upstream
from tests import running, tiny
from tests.pipelines import words

PIPELINES = Path(__file__).parents[2] / "pipelines"
SMALL = [*words.SMALL, *words.GENETIC, "tune=none"]
OURS = [
    "counts.rule=exact", "search=swap", "search.span=1", "decomposition.svd=whitened", "decomposition.ranks=global",
    "decomposition.multiple=2",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "family", "removed", "more"),
    [
        pytest.param("mixtral_moei2", "mixtral", 0.5, [], marks=pytest.mark.slow),
        ("mixtral_moei2", "mixtral", 0.5, OURS),
        pytest.param("qwen15_moe", "qwen2_moe", 0.5, [], marks=pytest.mark.slow),
        pytest.param("qwen15_moe", "qwen2_moe", 0.5, OURS, marks=pytest.mark.slow),
        pytest.param("deepseek_v2_lite", "deepseek_v2", 0.5398, [], marks=pytest.mark.slow),
        pytest.param("deepseek_v2_lite", "deepseek_v2", 0.5398, OURS, marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_a_pipeline_runs_on_a_small_model_of_its_family(
    name: str, family: str, removed: float, more: list[str], tmp_path: Path
) -> None:
    source = tiny.write(family, tmp_path / "model")
    matrix = running.matrix_of(tmp_path)
    build = pipeline.load(PIPELINES / f"{name}.py")
    target = pipeline.call(build, [f"model={source}", f"tokens={matrix.spec}", *SMALL, *more])
    store = running.store_in(tmp_path)
    running.run(store, target)
    out = tmp_path / "out"
    store.fetch(target.key, out)
    config, tensors = read_config(Folder(out)), headers(Folder(out))
    shapes = {n: t.shape for n, t in tensors.items()}
    formats = [format_of(shapes, config, i) for i in Family.of(config).moe_layers]
    assert sum(f.experts for f in formats) == round(0.75 * 8 * len(formats))
    before, after = (sum(prod(t.shape) for n, t in headers(Folder(f)).items() if ".experts." in n) for f in (source, out))
    # ranks are whole numbers, and these matrices are small: a rank is several percent of one
    assert removed - 0.01 <= 1 - after / before <= removed + 0.06
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(out)(torch.arange(3, 12)[None]).logits).all()
    report = running.reports(store, target)
    assert report["expert bytes"]["compressed"] / report["expert bytes"]["original"] == pytest.approx(after / before)


def test_the_constants_are_the_papers() -> None:
    """25 % of the experts, population 100, 50 generations, K=3, T=3, alpha 0.15."""
    for name in ("mixtral_moei2", "qwen15_moe", "deepseek_v2_lite"):
        build = pipeline.load(PIPELINES / f"{name}.py")
        defaults = {n: p.default for n, p in inspect.signature(build).parameters.items()}
        counts, search, cut = defaults["counts"], defaults["search"], defaults["decomposition"]
        assert counts.keep == 0.75 and cut.alpha == 0.15
        assert (search.population, search.generations) == (100, 50)
        assert (search.best, search.span) == (3, 3)
        assert (counts.rule, search.method, cut.svd, cut.ranks) == ("paper", "genetic", "vanilla", "paper")


@pytest.mark.slow
def test_choices_of_a_pipeline_can_be_read_and_diffed(tmp_path: Path) -> None:
    source, matrix = tiny.write("mixtral", tmp_path / "model"), running.matrix_of(tmp_path)
    build = pipeline.load(PIPELINES / "mixtral_moei2.py")
    target = pipeline.call(build, [f"model={source}", f"tokens={matrix.spec}", *SMALL])
    store = running.store_in(tmp_path)
    made = {s.name: s for s in upstream([target])}
    running.run(store, target)
    choice = json.loads(store.artifact(made["prune.pick"].key).file("choice.json").read_text())
    assert {"keep", "loss", "runner_up", "baselines"} <= set(choice)
    assert set(choice["baselines"]) == {"random", "frequency", "router_score", "reap", "aimer"}
    for name, file in {
        "prune.candidates": "candidates.json",
        "prune.counts_paper": "counts.json",
        "prune.span": "span.json",
        "decompose.ranks_paper": "ranks.json",
        "prune.importance": "importance.json",
    }.items():
        text = store.artifact(made[name].key).file(file).read_text()
        assert json.loads(text) and max(map(len, text.splitlines())) < 200, name
