"""The unified framework on a trained model: each of its methods and their combinations, and what moeflow puts beside them.

He et al., arXiv 2406.02500, Table 3, at small scale: the Mixtral of 21 M parameters in ../shared/models, 6 layers of 8 experts,
calibrated on 24,576 tokens and judged on 16,384 held-out tokens of each kind. KL is the divergence from the original; bytes are
those of the checkpoint's files beside the embedding, which nothing here touches; speeds are medians of alternating rounds against
the original, 256 tokens of prefill and 32 of decode. Everything runs through the steps that pipelines are made of, in a store that
is thrown away, or kept where MOEFLOW_BENCH_STORE says.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.quality import CALIBRATION, HELDOUT, HELDOUT_PASS, HELDOUT_SEQUENCES, KINDS, LENGTH, SEQUENCES, SHARED
from benchmarks.rows import Row
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.graph import Calibration, Model, Pass, Sample
from moeflow.methods.recipes import compare, moei2, naee, unified
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.trim import steps as trim
from moeflow.run import in_process
from moeflow.sources import Texts, pin
from moeflow.step import Step
from moeflow.store import Store

Stage = Callable[[Calibration], Model]
GROUP, SMALL = 64, 32


def slim(method: str, **options: Any) -> Stage:
    return partial(unified.slim, how=Slimming(method=method, **({"group": GROUP, "inputs": "parallel"} | options)))


AWQ, GPTQ = slim("awq"), slim("gptq", inputs="sequential", activation_order=True)
EXPERTS: Stage = partial(trim.trim, how=trim.Trimming("experts", 2, least=2))
LAYERS: Stage = partial(trim.trim, how=trim.Trimming("moe_blocks", 2))
BLOCKS: Stage = partial(trim.trim, how=trim.Trimming("decoder_layers", 1))
ENUMERATED: Stage = partial(naee.prune, keep=6)


def low_rank(ratio: float) -> Stage:
    return partial(moei2.decompose, how=Decomposition(ratio=ratio, multiple=SMALL))


def _grouped(bits: int = 4) -> Stage:
    return slim("gptq", inputs="sequential", activation_order=True, bits=bits, group=SMALL)


SINGLE: dict[str, tuple[Stage, ...]] = {
    "E2/8": (EXPERTS,),
    "L2/6": (LAYERS,),
    "B1/6": (BLOCKS,),
    "AWQ": (AWQ,),
    "GPTQ": (slim("gptq"),),
    "Wanda 2:4": (slim("wanda", pattern="2:4"),),
    "SparseGPT 2:4": (slim("sparsegpt", pattern="2:4"),),
    "Wanda 50 %": (slim("wanda", pattern="0.5"),),
    "SparseGPT 50 %": (slim("sparsegpt", pattern="0.5"),),
}
"""The paper's methods, each by itself."""

COMBINED: dict[str, tuple[Stage, ...]] = {
    "AWQ, then E2/8": (AWQ, EXPERTS),
    "E2/8, then AWQ": (EXPERTS, AWQ),
    "AWQ, then L2/6": (AWQ, LAYERS),
    "L2/6, then AWQ": (LAYERS, AWQ),
    "AWQ, then B1/6": (AWQ, BLOCKS),
    "B1/6, then AWQ": (BLOCKS, AWQ),
}
"""The paper's recipes, in its order and the other."""

OURS: dict[str, tuple[Stage, ...]] = {
    "rounding to nearest": (slim("round_to_nearest"),),
    "GPTQ in sequence, by activation": (GPTQ,),
    "GPTQ in sequence": (slim("gptq", inputs="sequential"),),
    "AWQ in sequence": (slim("awq", inputs="sequential"),),
    "Wanda 2:4 in sequence": (slim("wanda", pattern="2:4", inputs="sequential"),),
    "SparseGPT 2:4 in sequence": (slim("sparsegpt", pattern="2:4", inputs="sequential"),),
    "GPTQ in sequence, 8 bits": (slim("gptq", inputs="sequential", activation_order=True, bits=8),),
    "GPTQ in sequence, 3 bits": (slim("gptq", inputs="sequential", activation_order=True, bits=3),),
    "GPTQ in sequence, 2 bits": (slim("gptq", inputs="sequential", activation_order=True, bits=2),),
    "GPTQ in sequence, groups of 32": (_grouped(),),
    "NAEE, 6 of 8": (ENUMERATED,),
    "low rank, whitened, a quarter": (partial(moei2.decompose, how=Decomposition(ratio=0.25)),),
    "low rank, whitened, a half": (partial(moei2.decompose, how=Decomposition(ratio=0.5)),),
}
"""What moeflow has beside them, each by itself."""

TOGETHER: dict[str, tuple[Stage, ...]] = {
    "NAEE, 6 of 8, then GPTQ": (ENUMERATED, GPTQ),
    "NAEE, 6 of 8, then GPTQ, 2 bits": (ENUMERATED, slim("gptq", inputs="sequential", activation_order=True, bits=2)),
    "E2/8, then GPTQ": (EXPERTS, GPTQ),
    "low rank, a tenth, then GPTQ, 8 bits": (low_rank(0.1), _grouped(8)),
    "low rank, a sixteenth, then GPTQ": (low_rank(1 / 16), _grouped()),
    "low rank, three tenths, then GPTQ": (low_rank(0.3), _grouped()),
    "low rank, two fifths, then GPTQ": (low_rank(0.4), _grouped()),
    "low rank, two fifths, then GPTQ, 3 bits": (low_rank(0.4), _grouped(3)),
}
"""Our combinations: in every row at least two methods."""

AGAINST = (*SINGLE, "GPTQ in sequence, by activation", "GPTQ in sequence, 3 bits", "GPTQ in sequence, 2 bits")
"""What a combination has to beat at no more bytes: the paper's methods, and the best of them as well as it can be done."""


@dataclass(frozen=True)
class Result:
    """A checkpoint's bytes without the embedding, its speeds as multiples of the original's, and what it does to held-out text."""

    nbytes: float
    prefill: float
    decode: float
    perplexity: list[float]
    kl: list[float]

    @property
    def mean(self) -> float:
        return sum(self.kl) / len(self.kl)


def main() -> tuple[list[Row], str]:
    """Rows for the claims, and the table. Raises FileNotResultError where the model or the texts are absent."""
    results, whole = measured(SINGLE | COMBINED | OURS | TOGETHER)
    rows = []
    for name in AGAINST:
        rivals = {n: f for n, f in results.items() if n in TOGETHER and f.nbytes <= results[name].nbytes}
        best = min(rivals, key=lambda n: rivals[n].mean)
        what = f"KL of ours ({best}) against {name}, at {rivals[best].nbytes / results[name].nbytes:.2f} times its bytes"
        rows.append(Row(what, rivals[best].mean / results[name].mean, "at most", 1.0, "times"))
    twice = [n for n in SINGLE if f"{n} in sequence" in OURS]
    ratio = math.prod(results[n].mean / results[f"{n} in sequence"].mean for n in twice) ** (1 / len(twice))
    what = f"KL on dense inputs, the default, against in sequence (geometric mean of {', '.join(twice)})"
    rows.append(Row(what, ratio, "at most", 1.0, "times"))
    return rows, _table(results, whole)


def measured(methods: Mapping[str, tuple[Stage, ...]]) -> tuple[dict[str, Result], float]:
    """What each of these methods does to the model, and the original's bytes without the embedding."""
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(Store.open(os.environ.get("MOEFLOW_BENCH_STORE", folder)))
        results = {name: bench.measured(stages) for name, stages in methods.items()}
        return results, bench.whole


def _table(results: dict[str, Result], whole: float) -> str:
    lines = [
        "| method | bytes | prefill | decode | perplexity: "
        + " | ".join(KINDS)
        + " | KL: "
        + " | ".join(KINDS)
        + " | mean | frontier |",
        "|" + "---|" * 12,
    ]
    for name, f in results.items():
        ahead = not any(o.nbytes <= f.nbytes and o.mean < f.mean for o in results.values())
        figures = " | ".join([*(f"{p:.1f}" for p in f.perplexity), *(f"{k:.4f}" for k in (*f.kl, f.mean))])
        lines.append(
            f"| {name} | {f.nbytes / whole:.1%} | {f.prefill:.2f} | {f.decode:.2f} | {figures} | {'yes' if ahead else ''} |"
        )
    return "\n".join(lines)


class _Bench:
    """The original and its calibration; measures what stages make of it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.original = checkpoint.pinned(pin(str(SHARED / "models" / "mixtral-21m"), kind="model"))
        self.matrix = data.tokens(Texts(CALIBRATION), self.original, Sample(SEQUENCES, LENGTH))
        self.whole = 0.0

    def measured(self, stages: tuple[Stage, ...]) -> Result:
        model = self.original
        for stage in stages:
            model = stage(self._calibrated(model))
        heldout = compare.HeldOut(HELDOUT, HELDOUT_SEQUENCES, LENGTH, bos=False)
        compared = compare.reports(self.original, model, heldout, HELDOUT_PASS)
        reports = [r for r in compared if r.name in ("evaluate.size", "evaluate.quality", "evaluate.speed")]
        in_process.run([checkpoint.checkpoint_of(model), *reports], self.store)
        rows = {row["name"]: row for report in reports for row in self._rows(report)}
        embedding = self.original.config["vocab_size"] * self.original.config["hidden_size"] * 2
        self.whole = rows["bytes"]["original"] - embedding
        kinds = [n.removeprefix("KL to the original ") for n in rows if n.startswith("KL to the original")]
        return Result(
            rows["bytes"]["compressed"] - embedding,
            *(rows[n]["compressed"] / rows[n]["original"] for n in ("prefill", "decode")),
            [rows[f"perplexity {k}"]["compressed"] for k in kinds],
            [rows[f"KL to the original {k}"]["compressed"] for k in kinds],
        )

    def _calibrated(self, model: Model) -> Calibration:
        return calibrate.run(model, self.matrix, Pass(shard=32, stage=3, dtype="float32"), between=True)

    def _rows(self, report: Step) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.store.artifact(report.key).file("report.json").read_text())["rows"]
        return rows
