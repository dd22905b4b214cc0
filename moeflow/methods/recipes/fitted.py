"""Make a model fit into a budget: its size is what you say, and what stays is what moves its predictions least.

    moeflow fit MODEL --bytes 24GB
    ray job submit --working-dir . -- python pipelines/fit.py --store s3://bucket/prefix --gpus 1 -p model=MODEL \\
        -p budget.bytes=24GB

Instead of `-p budget.bytes=24GB`: `-p budget.ratio=0.25` (a quarter of the bytes goes), `-p budget.resident=24GB` (in memory),
`-p budget.speed=1.5` (fewer multiplications a token). Every layer is offered fewer experts, lower ranks, fewer bits, fewer bits
with either (with both: `-p offers.grid=all`), and no MoE block; each alternative is measured once, and the cheapest combination is
found exactly. Another budget on the same model makes and measures no alternative again but the round around its own choice.

`-p recover.rows=4096` fine-tunes what was built towards the original, on so many rows of the calibration's texts, half of which
the original goes on with itself (`-p recover.generated=0`: none): of packed experts their codes and scales, which takes no byte,
but as much memory while it trains as full fine-tuning; of more than two billion weights, or with `-p recover.packed=scales`,
their scales alone, which takes little of both, or with `-p recover.packed=beside` factors, which are kept beside them where the
budget has room, or merged by packing again.
"""

from dataclasses import replace

from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.finetune.recipe import Gang
from moeflow.methods.fit.options import Budget, Offers
from moeflow.methods.graph import Calibrating
from moeflow.methods.recipes import compare, fit
from moeflow.methods.recipes.compare import HeldOut
from moeflow.methods.recipes.tune import Recovering, tuned
from moeflow.sources import Source, Texts
from moeflow.step import Step

C4 = "hf://datasets/allenai/c4@main/en/c4-train.00000-of-01024.json.gz#text"
WIKITEXT2 = "hf://datasets/Salesforce/wikitext@main/wikitext-2-raw-v1/test-00000-of-00001.parquet#text"


def build(
    model: Source,
    *,
    budget: Budget,
    tokens: Texts = Texts(C4),
    heldout: HeldOut = HeldOut(WIKITEXT2, bos=False),
    offers: Offers = Offers(),
    calibration: Calibrating = Calibrating(seed=42, group=1000, shard=128, record=65_536, per_expert=64),
    recover: Recovering | None = None,
    gang: Gang = Gang(),
    frontier: bool = False,
) -> Step:
    original = checkpoint.pinned(model)
    matrix = data.tokens(tokens, original, calibration.sample)
    passed = calibration.passed
    how = recover and replace(recover.on(tokens, heldout.texts), length=recover.length or matrix.spec.output.length)
    healed = (lambda plain: tuned(plain, original, how, gang, passed)) if how else None
    fitted = fit.compress(fit.calibrated(original, matrix, passed), budget, offers, healed)
    if frontier:
        return fitted.frontier
    reports = compare.reports(original, fitted.model, heldout, passed, tokens=matrix, engine=offers.runs.word)
    made = checkpoint.checkpoint_of(fitted.model)
    made.spec.output.form.check(offers.runs.word)
    return made.reporting(*fitted.reports, *reports)
