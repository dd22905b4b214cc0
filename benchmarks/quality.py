"""What is left of a trained model when a quarter or half of its experts' bytes is gone, by method, on text that no method has seen.

The Mixtral of 21 M parameters in ../shared/models (trained on prose, mathematics and code) and the texts in ../shared/data;
calibrated on 24,576 tokens, a third of each kind, and judged on 16,384 held-out tokens of each. Everything runs through the steps
that pipelines are made of, in a store that is thrown away, or kept where MOEFLOW_BENCH_STORE says.
"""

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import Row
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.graph import Calibration, Model, Pass, Sample
from moeflow.methods.prune.counts import Counts
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, moei2, naee
from moeflow.run import in_process
from moeflow.sources import Texts, pin
from moeflow.step import Step
from moeflow.store import Store

SHARED = Path(__file__).parents[2] / "shared"
CALIBRATION = ",".join(
    [
        *(f"{SHARED}/data/{name}" for name in ("wikitext2_validation.jsonl#text", "lima.jsonl#instruction+response")),
        *(f"{SHARED}/data/{name}" for name in ("gsm8k_train.jsonl#question+answer", "metamathqa_part.jsonl#query+response")),
        "python:stdlib*2",
    ]
)
HELDOUT = ",".join(
    f"{SHARED}/data/{name}"
    for name in ("wikitext2_test.jsonl#text", "gsm8k_test.jsonl#question+answer", "humaneval.jsonl#prompt+canonical_solution")
)
KINDS = ("prose", "mathematics", "code")
SEQUENCES, HELDOUT_SEQUENCES, LENGTH, SEEDS, RESAMPLED = 96, 64, 256, 3, 5_000
HELDOUT_PASS = Pass(16, 128, dtype="float32")
UNIFORM = "NAEE, uniform"
COMPARED = ("ours", "ours, ranks alone", "ours, pruning only")
TARGETS = {0.25: 0.75, 0.5: 0.85}

Method = Callable[[Calibration, Step, float, int], Model]


def _by_score(name: str, calibration: Calibration, matrix: Step, removed: float, seed: int) -> Model:
    return naee.prune(calibration, round(8 * (1 - removed)), Search(name, seed=seed))


def _naee(calibration: Calibration, matrix: Step, removed: float, seed: int) -> Model:
    return naee.prune(calibration, keep=round(8 * (1 - removed)))


def _moei2(calibration: Calibration, matrix: Step, removed: float, seed: int, *, share: float) -> Model:
    """The paper: counts by importance, genetic search, spans of three layers among three sets; then vanilla, by importance."""
    dropped = share * removed
    pruned = moei2.prune(calibration, Counts(1 - dropped, rule="paper"), Search("genetic", best=3, span=3, seed=seed))
    ratio = moei2.ratio_left(removed, dropped)
    return moei2.decompose(_run(pruned, matrix), Decomposition(ratio=ratio, ranks="paper", svd="vanilla")) if ratio else pruned


def _ours(calibration: Calibration, matrix: Step, removed: float, seed: int, *, share: float) -> Model:
    """Exact allocation by measured divergence, swap search; then whitened, at ranks that one budget gives all matrices."""
    dropped = share * removed
    pruned = moei2.prune(calibration, Counts(1 - dropped), Search("swap", seed=seed)) if dropped else calibration.model
    ratio = moei2.ratio_left(removed, dropped)
    again = _run(pruned, matrix) if dropped else calibration
    return moei2.decompose(again, Decomposition(ratio=ratio)) if ratio else pruned


METHODS: dict[str, Method] = {
    "random": partial(_by_score, "random"),
    "frequency": partial(_by_score, "frequency"),
    "REAP": partial(_by_score, "reap"),
    "AIMER": partial(_by_score, "aimer"),
    UNIFORM: _naee,
    "MoE-I², pruning only": partial(_moei2, share=1.0),
    "MoE-I², pruning and vanilla SVD": partial(_moei2, share=0.5),
    "ours, pruning only": partial(_ours, share=1.0),
    "ours": partial(_ours, share=0.5),
    "ours, ranks alone": partial(_ours, share=0.0),
}
"""What `share` of the bytes goes as whole experts; the rest goes as ranks."""


def main() -> tuple[list[Row], str]:
    """Rows for the targets, and the table of all methods. Raises FileNotFoundError where the model or the texts are absent."""
    source = pin(str(SHARED / "models" / "mixtral-21m"), kind="model")
    lines = [
        "| bytes removed | method | removed | perplexity | | | KL to the original | | | mean |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines.append(f"| | | | {' | '.join(KINDS)} | {' | '.join(KINDS)} | |")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store, original = Store.open(os.environ.get("MOEFLOW_BENCH_STORE", folder)), checkpoint.pinned(source)
        for removed, target in TARGETS.items():
            apart: dict[str, list[list[np.ndarray]]] = {}
            for seed in range(SEEDS):
                for name, method in METHODS.items():
                    if seed and name not in (UNIFORM, COMPARED[0]):
                        continue
                    measured = _measured(store, original, method, removed, seed)
                    apart.setdefault(name, []).append(measured["apart"])
                    if seed == 0:
                        lines.append(_line(removed, name, measured))
            for name in COMPARED:
                for seed in range(len(apart[name])):
                    ratio, low, high = interval(apart[name][seed], apart[UNIFORM][seed])
                    what = f"{name}, {removed:.0%} removed, seed {seed}: KL against NAEE's (95 %: {low:.3f} to {high:.3f})"
                    rows.append(Row(what, ratio, "at most", target, "times"))
    return rows, "\n".join(lines)


def _run(model: Model, matrix: Step) -> Calibration:
    return calibrate.run(model, matrix, Pass(shard=32, stage=3, dtype="float32"))


def _measured(store: Store, original: Model, method: Method, removed: float, seed: int) -> dict[str, Any]:
    matrix = data.tokens(Texts(CALIBRATION), original, Sample(SEQUENCES, LENGTH, seed=seed))
    calibration = _run(original, matrix)
    small = method(calibration, matrix, removed, seed)
    compared = compare.reports(original, small, compare.HeldOut(HELDOUT, HELDOUT_SEQUENCES, LENGTH, bos=False), HELDOUT_PASS)
    reports = [r for r in compared if r.name in ("evaluate.size", "evaluate.quality")]
    in_process.run([checkpoint.checkpoint_of(small), *reports], store)
    read = [json.loads(store.artifact(r.key).file("report.json").read_text()) for r in reports]
    size = next(row for row in read[0]["rows"] if row["name"] == "expert bytes")
    return {
        "removed": 1 - size["compressed"] / size["original"],
        "perplexity": [next(row["compressed"] for row in r["rows"] if row["name"].startswith("perplexity")) for r in read[1:]],
        "apart": [np.array(r["divergence_of_sequences"]) for r in read[1:]],
    }


def _line(removed: float, name: str, measured: dict[str, Any]) -> str:
    means = [float(a.mean()) for a in measured["apart"]]
    words = [f"{p:.1f}" for p in measured["perplexity"]] + [f"{m:.4f}" for m in [*means, sum(means) / len(means)]]
    return f"| {removed:.0%} | {name} | {measured['removed']:.1%} | {' | '.join(words)} |"


def interval(ours: list[np.ndarray], theirs: list[np.ndarray]) -> tuple[float, float, float]:
    """The ratio of mean divergences over the texts, and its 95 % interval by resampling sequences, the same for both."""
    rng = np.random.default_rng(0)
    picked = [rng.integers(0, len(a), (RESAMPLED, len(a))) for a in ours]
    means = [sum(a[p].mean(1) for a, p in zip(side, picked, strict=True)) for side in (ours, theirs)]
    low, high = np.quantile(means[0] / means[1], [0.025, 0.975])
    return float(sum(a.mean() for a in ours) / sum(a.mean() for a in theirs)), float(low), float(high)
