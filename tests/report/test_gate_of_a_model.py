"""The gate on what the small trained model's compression really measures: each kind of bound holds once and fails once."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moeflow.report.figures import Figure, read_figures
from moeflow.report.gate import bound, judge, read_gate, refusal
from moeflow.run import pipeline
from moeflow.store import Store
from tests import running

ROOT = Path(__file__).parents[2]
SHORT = ["calibration.sequences=16", "calibration.length=64", "calibration.batch=4", "heldout.sequences=16", "heldout.length=64"]
pytestmark = pytest.mark.slow


def figures(model: Path, store: Store) -> tuple[Figure, ...]:
    """The figures of a pruned model, but for its speed."""
    texts = [f"model={model}", "tokens=python:stdlib/a*.py", "heldout=python:stdlib/t*.py"]
    target = pipeline.call(pipeline.load(ROOT / "pipelines" / "mixtral.py"), [*texts, *SHORT])
    reports = [r for r in target.reports if r.name != "evaluate.speed"]
    running.run(store, *reports)
    return read_figures(store, [r.key for r in reports])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[Figure, ...], Store, Path]:
    folder = tmp_path_factory.mktemp("gate")
    store = running.store_in(folder)
    return figures(running.SMALL, store), store, folder


def value(all_of_them: tuple[Figure, ...], word: str) -> Figure:
    (figure,) = (f for f in all_of_them if f.figure == word)
    return figure


def test_each_kind_of_bound_holds_where_it_should_and_fails_where_it_should(
    measured: tuple[tuple[Figure, ...], Store, Path],
) -> None:
    mine, _, _ = measured
    kl, perplexity = value(mine, "kl"), value(mine, "perplexity")
    assert kl.compressed and kl.interval and kl.interval[0] < kl.compressed < kl.interval[1]
    inside = (kl.compressed + kl.interval[1]) / 2  # the value keeps this bound, the interval does not
    ratio = (perplexity.compressed or 0) / (perplexity.original or 1)
    better = tuple(f if f.figure != "kl" else Figure("kl", f.name, f.kind, f.unit, 0.0, kl.compressed / 10, f.text) for f in mine)
    for word, promoted, state in (
        (f"kl<{kl.interval[1] * 1.01}", None, "holds"),
        (f"kl<{inside}", None, "fails"),
        (f"kl[{kl.text}]<{kl.compressed / 2}", None, "fails"),
        ("kl[another text]<1", None, "undecidable"),
        ("agreement>=50%", None, "holds"),
        ("agreement>=99.9%", None, "fails"),
        (f"perplexity<={ratio * 1.5}x", None, "holds"),
        ("perplexity<=0.5x", None, "fails"),
        ("bytes<=2.7MB", None, "holds"),
        ("bytes<=1MiB", None, "fails"),
        ("bytes<=0.9x", None, "holds"),
        ("bytes<=0.5x", None, "fails"),
        ("experts>=6", None, "holds"),
        ("kl<=2x promoted", mine, "holds"),
        ("kl<=2x promoted", better, "fails"),
        ("kl<2x", None, "undecidable"),
        ("gsm8k>=0.9x", None, "undecidable"),
    ):
        (decision,) = judge([bound(word)], mine, promoted)
        assert decision.state == state, decision


def test_a_deliberately_broken_model_is_refused(measured: tuple[tuple[Figure, ...], Store, Path]) -> None:
    """All experts of its last layers answer with the wrong sign: what is made of it is close to it, and useless."""
    mine, store, folder = measured
    broken = folder / "broken"
    shutil.copytree(running.SMALL, broken)
    for path in broken.glob("*.safetensors"):
        tensors = {n: -t if ".w2." in n else t for n, t in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    theirs = figures(broken, store)
    gate = read_gate(["kl<5", "perplexity<=1.5x promoted"])
    good, bad = judge(gate, mine, mine), judge(gate, theirs, mine)
    assert [d.state for d in good] == ["holds", "holds"], refusal(good)
    assert bad[1].state == "fails" and "times the promoted version's" in refusal(bad)
