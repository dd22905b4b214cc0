"""What fine-tuning gives back to a compressed model, and what it costs, on text that nothing was trained on.

The Mixtral of 21 M parameters in ../shared/models with half of its experts taken out (NAEE, 4 of 8), with half of its experts'
bytes gone (MoE-I², decomposed with and without whitening), and with fewer experts a token. Each is trained on the same rows, by
two processes of one core each, for as many optimizer steps (one for three times as many); KL is the divergence from the original
on 16,384 held-out tokens of each kind. Everything runs through the steps that pipelines are made of, in a store that is thrown
away, or kept where MOEFLOW_BENCH_STORE says. Times are those of this machine, and good for their ratios.
"""

import json
import os
import tempfile
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.quality import CALIBRATION, HELDOUT, HELDOUT_PASS, HELDOUT_SEQUENCES, KINDS, LENGTH, SEQUENCES, SHARED
from benchmarks.rows import Row
from moeflow.methods import rewrite
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.fewer_active import steps as fewer_active
from moeflow.methods.finetune.recipe import Gang, Recipe
from moeflow.methods.graph import Calibration, Model, Pass, Sample
from moeflow.methods.prune.counts import Counts
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, moei2, naee, tune
from moeflow.run import in_process
from moeflow.sources import Texts, pin
from moeflow.step import Step
from moeflow.store import Store

ROWS, STEPS, BATCH, EVERY, MINUTES = 1024, 40, 16, 10, 15
GANG = Gang(processes=2, gpus=0, zero=1, micro=4, save_every=30)
PASS = Pass(shard=32, stage=3, dtype="float32")
HALF = 0.5
VALIDATION = {
    "prose": f"{SHARED}/data/wikitext2_validation.jsonl#text",
    "mathematics": f"{SHARED}/data/gsm8k_train.jsonl#question+answer",
    "code": "python:stdlib",
}
"""Of the same texts as the rows that are trained on: they choose the state that is kept, and no claim rests on them."""

TUNINGS: dict[str, dict[str, Any]] = {
    "Router-KD": {"mode": "router", "loss": "kl", "rate": 1e-2},
    "LoRA, language modelling": {"mode": "lora", "loss": "lm", "rate": 3e-3},
    "LoRA, KL": {"mode": "lora", "loss": "kl", "rate": 3e-3},
    "experts only, KL": {"mode": "experts", "loss": "kl", "rate": 1e-3},
}
LONGER = {"LoRA, KL, three times as long": TUNINGS["LoRA, KL"] | {"steps": 3 * STEPS}}


@dataclass(frozen=True)
class Found:
    """A model on held-out text: KL and perplexity of each kind, expert products a token, and how it was trained."""

    kl: list[float]
    perplexity: list[float]
    products: float
    training: dict[str, Any] | None = None

    @property
    def mean(self) -> float:
        return sum(self.kl) / len(self.kl)


class Recovery:
    """The original, its calibration, the rows to train on and what the original says of them; measures models made of it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.original = checkpoint.pinned(pin(str(SHARED / "models" / "mixtral-21m"), kind="model"))
        self.matrix = data.tokens(Texts(CALIBRATION), self.original, Sample(SEQUENCES, LENGTH))
        self.calibration: Calibration = calibrate.run(self.original, self.matrix, PASS)
        self.data = data.tokens(Texts(CALIBRATION), self.original, Sample(ROWS, LENGTH, seed=1))
        self.validation = {
            kind: data.tokens(Texts(name), self.original, Sample(12, LENGTH, seed=2)) for kind, name in VALIDATION.items()
        }

    def tuned(self, model: Model, **options: Any) -> tune.Tuned:
        how = Recipe(**({"steps": STEPS, "batch": BATCH, "warmup": 0.05, "dtype": "float32", "every": EVERY} | options))
        teacher = {"teacher": self.original, "passed": PASS}
        return tune.tune(model, self.data, how, **teacher, validation=self.validation, gang=GANG)

    def measured(self, model: Model, tuned: tune.Tuned | None = None) -> Found:
        heldout = compare.HeldOut(HELDOUT, HELDOUT_SEQUENCES, LENGTH, bos=False)
        reports = compare.reports(self.original, model, heldout, HELDOUT_PASS)
        wanted = [r for r in reports if r.name in ("evaluate.quality", "evaluate.experts_per_token")]
        in_process.run([checkpoint.checkpoint_of(model), *wanted], self.store)
        rows = [row for r in wanted for row in self._read(r, "report.json")["rows"]]

        def values(beginning: str) -> list[float]:
            return [row["compressed"] for row in rows if row["name"].startswith(beginning)]

        layers = len(self.original.moe_layers)
        products = values("expert products") or [int(model.config["num_experts_per_tok"]) * float(layers)]
        training = None if tuned is None else self._read(tuned.trained, "training.json")
        return Found(values("KL to"), values("perplexity"), sum(products) / len(products), training)

    def _read(self, made: Step, name: str) -> Any:
        return json.loads(self.store.artifact(made.key).file(name).read_text())


def main() -> tuple[list[Row], str]:
    """Rows for the targets, and the tables. Raises FileNotFoundError where the model or the texts are absent."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Recovery(Store.open(os.environ.get("MOEFLOW_BENCH_STORE", folder)))
        rows, tables = [], []
        for part in (_pruned, _low_rank, _fewer):
            claims, table = part(bench)
            rows += claims
            tables.append(table)
    return rows, "\n\n".join(tables)


def _pruned(bench: Recovery) -> tuple[list[Row], str]:
    pruned = naee.prune(bench.calibration, keep=4)
    return _recovered(bench, "4 of 8 experts (NAEE)", pruned, TUNINGS | LONGER, target=True)


def _low_rank(bench: Recovery) -> tuple[list[Row], str]:
    counts = Counts(0.75, rule="paper", importance="recon")
    pruned = moei2.prune(bench.calibration, counts, Search("genetic", best=3, span=3, generations=20))
    again = calibrate.run(pruned, bench.matrix, PASS)
    ratio = moei2.ratio_left(0.5, 0.25)
    vanilla = moei2.decompose(again, Decomposition(ratio=ratio, ranks="paper", svd="vanilla", importance="recon"))
    whitened = moei2.decompose(again, Decomposition(ratio=ratio, ranks="paper", svd="whitened", importance="recon"))
    only = {name: TUNINGS[name] for name in ("LoRA, KL",)}
    kl = {name: options for name, options in TUNINGS.items() if options["loss"] == "kl"}
    first = _recovered(bench, "MoE-I² at half of the bytes, whitened", whitened, kl)
    second = _recovered(bench, "MoE-I² at half of the bytes, vanilla SVD", vanilla, only)
    return first[0] + second[0], f"{first[1]}\n\n{second[1]}"


def _recovered(
    bench: Recovery, what: str, model: Model, tunings: dict[str, dict[str, Any]], *, target: bool = False
) -> tuple[list[Row], str]:
    """What each tuning does to a model's divergence: rows, and a table with the course of the validation loss."""
    before = bench.measured(model)
    lines = [
        f"{what}: KL {before.mean:.4f}",
        "",
        f"| trained | parameters | minutes | KL after: {' | '.join(KINDS)} | mean | removed | a minute | per 1,000 trained |"
        f" validation loss every {EVERY} steps |",
        "|---" * (7 + len(KINDS) + 1) + "|",
    ]
    rows, gone_of = [], {}
    for name, options in tunings.items():
        tuned = bench.tuned(model, **options)
        after = bench.measured(tuned.model, tuned)
        training = after.training or {}
        minutes, gone = training["seconds"] / 60, 1 - after.mean / before.mean
        gone_of[name] = (gone, minutes)
        course = " ".join(f"{v['mean']:.3f}" for v in training["validations"])
        lines.append(
            f"| {name} | {training['trained']:,} | {minutes:.1f} | {' | '.join(f'{k:.4f}' for k in after.kl)} | {after.mean:.4f} "
            f"| {gone:.1%} | {gone / minutes:.1%} | {1000 * gone / training['trained']:.3%} | {course} |"
        )
        rows.append(Row(f"{what}, {name}: KL after against before", after.mean / before.mean, "at most", 1.0, "times"))
    if target:
        best = max(gone for gone, minutes in gone_of.values() if minutes <= MINUTES)
        rows.append(Row(f"{what}: part of the added KL that the best removes in {MINUTES} minutes", best, "at least", HALF, ""))
    return rows, "\n".join(lines)


def _fewer(bench: Recovery) -> tuple[list[Row], str]:
    """Perplexity against expert products a token: skipping and Compressed Experts, and top-1 as it is and trained alike."""
    original = bench.original
    config = original.config | {"num_experts_per_tok": 1}
    top1 = replace(original, config=config, rest=rewrite.configured(original.rest, config=config))
    attached = fewer_active.attach(original, fewer_active.CompressedExperts(main=1))
    models: dict[str, Model | tune.Tuned] = {
        "top-2, the original": original,
        "skipping, median": fewer_active.skip(bench.calibration),
        **{
            f"skipping, {active} experts": fewer_active.skip(bench.calibration, fewer_active.Skipping(active))
            for active in (1.75, 1.25)
        },
        "top-1": top1,
        "Compressed Experts as they begin": attached,
        "Compressed Experts, trained alone": bench.tuned(attached, mode="compressed_experts", loss="kl", rate=2e-2),
        "top-1, everything trained": bench.tuned(top1, mode="full", loss="kl", rate=5e-4),
        "Compressed Experts, everything trained": bench.tuned(attached, mode="full", loss="kl", rate=5e-4),
    }
    lines = [f"| | products | perplexity: {' | '.join(KINDS)} | KL |", "|---" * (3 + len(KINDS)) + "|"]
    results = {}
    for name, made in models.items():
        model, tuned = (made.model, made) if isinstance(made, tune.Tuned) else (made, None)
        one = results[name] = bench.measured(model, tuned)
        lines.append(f"| {name} | {one.products:.2f} | {' | '.join(f'{p:.1f}' for p in one.perplexity)} | {one.mean:.4f} |")
    pairs = {
        "skipping, 1.25 experts": "top-1",
        "Compressed Experts, trained alone": "top-1",
        "Compressed Experts, everything trained": "top-1, everything trained",
    }
    return [
        Row(f"KL of {name} against {other}", results[name].mean / results[other].mean, "at most", 1.0, "times")
        for name, other in pairs.items()
    ], "\n".join(lines)
