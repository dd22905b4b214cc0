"""One dial beside every recipe: at six budgets, what `fit` builds against the best of the recipes that takes no more bytes.

The Mixtral of 21 M parameters in ../shared/models and the models of `benchmarks.models`, calibrated on 24,576 tokens with three
seeds, judged by the divergence from the original on 16,384 held-out tokens each of prose, mathematics and code, in fp32;
intervals by resampling sequences, the same for both sides. Bytes are those of the checkpoint's files beside the embedding, which
nothing here touches. With `--recover ROWS`, what fit builds at a KL of 0.002 or more is fine-tuned towards the original (LoRA, and
the codes and scales of packed experts), trained on so many rows of 256 tokens of the calibration's files, of which no held-out text
is one; half of the rows the original goes on with itself. With `--aimed` the recipes quantize towards the same target as fit does,
which their own papers do not.
Everything is kept in the store that MOEFLOW_BENCH_STORE names, so that more seeds and budgets compute only what is new.

    MOEFLOW_BENCH_STORE=FOLDER python -m benchmarks.dial [MODEL ...] [--seeds 0 1 2] [--budgets 0.16 0.185 ...] [--removed 0.25 0.5]
        [--recover ROWS] [--aimed]
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import models
from benchmarks.quality import CALIBRATION, HELDOUT, HELDOUT_PASS, HELDOUT_SEQUENCES, LENGTH, SEQUENCES, SHARED, interval
from benchmarks.rows import Row
from benchmarks.unified import GROUP, SMALL, Stage, low_rank, slim
from moeflow.arch import EMBEDDING
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.finetune.recipe import Gang
from moeflow.methods.fit.options import Budget, Offers
from moeflow.methods.graph import Calibration, Model, Pass, Sample
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, fit, moei2, naee, unified
from moeflow.methods.recipes.tune import Recovering, Tuned, tuned
from moeflow.methods.slim.methods import Slimming
from moeflow.run import in_process
from moeflow.sources import Texts, pin
from moeflow.step import Step
from moeflow.store import Store

BUDGETS = (0.16, 0.185, 0.22, 0.25, 0.31, 0.40)
"""Parts of all bytes beside the embedding that may stay."""
REMOVED = (0.25, 0.5)
"""Parts of the experts' bytes that ranks alone take away, beside a fit of no more bytes."""
OFFERS: dict[str, Any] = {"measured": 6144}
WORTH = 0.002
"""The KL from which on a model is recovered."""
PASS = Pass(shard=32, stage=3, dtype="float32")
GANG = Gang(processes=1, gpus=int(torch.cuda.is_available()), micro=4)


def _gptq(bits: int, group: int) -> Stage:
    return slim("gptq", inputs="sequential", activation_order=True, bits=bits, group=group)


def _pruned(calibration: Calibration) -> Model:
    """Three quarters of each layer's experts, by NAEE's search where all subsets can be tried."""
    model = calibration.model
    experts = model.layers[model.moe_layers[0]].spec.output.experts
    return naee.prune(calibration, round(0.75 * experts), Search("enumerate" if experts <= 8 else "swap"))


RECIPES: dict[str, tuple[Stage, ...]] = {
    "three quarters of the experts, GPTQ, 2 bits": (_pruned, _gptq(2, GROUP)),
    "low rank, two fifths, GPTQ, 3 bits": (low_rank(0.4), _gptq(3, SMALL)),
    "low rank, two fifths, GPTQ": (low_rank(0.4), _gptq(4, SMALL)),
    "low rank, three tenths, GPTQ": (low_rank(0.3), _gptq(4, SMALL)),
    "low rank, a sixteenth, GPTQ": (low_rank(1 / 16), _gptq(4, SMALL)),
    "GPTQ, 2 bits": (_gptq(2, GROUP),),
    "GPTQ, 3 bits": (_gptq(3, GROUP),),
    "GPTQ": (_gptq(4, GROUP),),
    "GPTQ, groups of 32": (_gptq(4, SMALL),),
}
"""The recipes of `benchmarks.unified` that no other one of fewer bytes beat there, and GPTQ at every width."""


def aimed(stage: Stage) -> Stage:
    """The same stage, where it quantizes towards what fit does: each expert's last matrix makes up for what went before it."""
    quantizes = isinstance(stage, partial) and stage.func is unified.slim
    return partial(unified.slim, how=replace(stage.keywords["how"], target="model")) if quantizes else stage


@dataclass(frozen=True)
class Judged:
    """What a recipe left of a model: the part of its bytes, and the divergence of every held-out sequence, text by text."""

    part: float
    apart: list[np.ndarray]

    @property
    def mean(self) -> float:
        return float(sum(a.mean() for a in self.apart) / len(self.apart))


class Bench:
    """One model with one seed of its calibration."""

    def __init__(self, store: Store, folder: str, seed: int) -> None:
        self.store, self.original = store, checkpoint.pinned(pin(folder, kind="model"))
        self.matrix = data.tokens(Texts(CALIBRATION), self.original, Sample(SEQUENCES, LENGTH, seed=seed))
        table = self.original.rest.spec.output.tensors[EMBEDDING]
        self.embedding = int(np.prod(table[1])) * 2

    def calibrated(self, model: Model, **also: Any) -> Calibration:
        return calibrate.run(model, self.matrix, PASS, between=True, **also)

    def recipe(self, stages: Sequence[Stage]) -> Judged:
        model = self.original
        for stage in stages:
            how = stage.keywords.get("how") if isinstance(stage, partial) else None
            whole = isinstance(how, Slimming) and how.target == "model"
            model = stage(self.calibrated(model, **({"beside": PASS.shard} if whole else {})))
        return self.judged(model)

    def recipes(self, aim: bool) -> dict[str, Judged]:
        """Every recipe that this model can have: small experts have no rank, or no width, for some."""
        made = {}
        for name, stages in RECIPES.items():
            try:
                made[name + ", aimed as fit" * aim] = self.recipe([*map(aimed, stages)] if aim else stages)
            except ValueError as error:
                print(f"without {name!r}: {error}", file=sys.stderr, flush=True)
        return made

    def fitted(self, part: float, rows: int = 0, **offers: Any) -> Judged:
        """What fit builds; with `rows` of text, recovered towards the original."""
        whole = sum(layer.spec.output.nbytes for layer in self.original.layers)
        budget = Budget(bytes=str(int(self.embedding + part * whole)))
        made = fit.compress(
            fit.calibrated(self.original, self.matrix, PASS, between=True),
            budget,
            Offers(**offers),
            self.recovered(rows) if rows else None,
        )
        return self.judged(made.model, *made.reports)

    def recovered(self, rows: int) -> Callable[[Model], Tuned]:
        how = Recovering(rows=rows, length=LENGTH, dtype="float32").on(Texts(CALIBRATION), HELDOUT)
        return lambda plain: tuned(plain, self.original, how, GANG, PASS)

    def judged(self, model: Model, *beside: Step) -> Judged:
        heldout = compare.HeldOut(HELDOUT, HELDOUT_SEQUENCES, LENGTH, bos=False)
        compared = compare.reports(self.original, model, heldout, HELDOUT_PASS)
        reports = [r for r in compared if r.name in ("evaluate.size", "evaluate.quality")]
        in_process.run([checkpoint.checkpoint_of(model), *reports, *beside], self.store)
        size, *quality = (json.loads(self.store.artifact(r.key).file("report.json").read_text()) for r in reports)
        taken = next(row for row in size["rows"] if row["name"] == "bytes")
        part = (taken["compressed"] - self.embedding) / (taken["original"] - self.embedding)
        return Judged(part, [np.array(r["divergence_of_sequences"]) for r in quality])


def main(
    names: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    budgets: Sequence[float] = BUDGETS,
    removed: Sequence[float] = REMOVED,
    recover: int = 0,
    aim: bool = False,
) -> tuple[list[Row], str]:
    """Rows for the targets, and the table. Raises FileNotFoundError where the model or the texts are absent."""
    store = Store.open(os.environ["MOEFLOW_BENCH_STORE"])
    rows, lines = [], ["| model | seed | budget | recipe | bytes | KL | fit: bytes | KL | ratio | 95 % |", "|" + "---|" * 10]
    for name in names or ("mixtral-21m", *models.CONFIGS):
        ahead = []
        folder = SHARED / "models" / name
        for seed in seeds:
            bench = Bench(store, str(folder if folder.is_dir() else models.trained(name, store)), seed)
            recipes = bench.recipes(aim)
            for part in budgets:
                ours = bench.fitted(part, **OFFERS)
                known = {n: r for n, r in recipes.items() if r.part <= part}
                rows_of, line = _beside(name, seed, part, known, ours)
                lines.append(line)
                print(line, file=sys.stderr, flush=True)
                rows += rows_of
                ahead += [r.value for r in rows_of]
                if recover and ours.mean >= WORTH:
                    healed = bench.fitted(part, recover, **OFFERS)
                    rows_of, line = _beside(name, seed, part, {f"fit as it is, then {recover:,} rows": ours}, healed)
                    rows += [replace(row, target=0.5) for row in rows_of]
                    lines.append(line)
                    print(line, file=sys.stderr, flush=True)
            for part in removed:
                alone = bench.recipe((partial(moei2.decompose, how=Decomposition(ratio=part)),))
                ours = bench.fitted(alone.part, **OFFERS)
                rows_of, line = _beside(name, seed, alone.part, {f"ranks alone, {part:.0%} removed": alone}, ours)
                lines.append(line)
                print(line, file=sys.stderr, flush=True)
                rows += rows_of
        won = sum(ratio <= 0.9 for ratio in ahead)
        rows.append(
            Row(
                f"{name}: budgets at which fit's KL is lower by a tenth, of {len(ahead)}",
                won,
                "at least",
                len(ahead) / 2,
                "of them",
            )
        )
    return rows, "\n".join(lines)


def _beside(name: str, seed: int, part: float, known: dict[str, Judged], ours: Judged) -> tuple[list[Row], str]:
    best = min(known, key=lambda n: known[n].mean, default="")
    if not best:
        return [], f"| {name} | {seed} | {part:.1%} | none | | | {ours.part:.1%} | {ours.mean:.5f} | | |"
    theirs = known[best]
    ratio, low, high = interval(ours.apart, theirs.apart)
    row = Row(f"{name}, seed {seed}: KL of fit at {part:.1%} of the bytes against {best}", ratio, "at most", 1.0, "times")
    figures = f"{theirs.part:.1%} | {theirs.mean:.5f} | {ours.part:.1%} | {ours.mean:.5f} | {ratio:.3f} | {low:.3f} to {high:.3f}"
    return [row], f"| {name} | {seed} | {part:.1%} | {best} | {figures} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2))
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS)
    parser.add_argument("--removed", type=float, nargs="*", default=REMOVED)
    parser.add_argument("--recover", type=int, default=0, metavar="ROWS")
    parser.add_argument("--aimed", action="store_true")
    given = parser.parse_args()
    held, table = main(given.models, given.seeds, given.budgets, given.removed, given.recover, given.aimed)
    print(*(row.line() for row in held), "", table, sep="\n")
