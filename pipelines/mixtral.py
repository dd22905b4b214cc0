"""Drop the least important experts of every layer of Mixtral 8x7B (Lu et al., "Not All Experts are Equal", ACL 2024).

    ray job submit --working-dir . -- python pipelines/mixtral.py --store s3://bucket/prefix --gpus 1 -p keep=6

The constants are the paper's: 128 sequences of 2,048 tokens of C4, documents packed in groups of 1,000 with a
beginning-of-sequence token each, the checkpoint's own precision (bf16), every layer searched on its own. One task runs all of them
through a stage, so that the weights are read once: reading a layer takes longer than computing with it.

`-p skipping=median` adds the paper's dynamic skipping, calibrated on the pruned model: about half of the tokens then use one
expert; `-p skipping=1.7` sets how many experts a token has on average. `-p tune=lora` fine-tunes what is left.
"""

from moeflow.cli import main
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.fewer_active.steps import Skipping
from moeflow.methods.finetune.recipe import Gang
from moeflow.methods.graph import Calibrating
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, naee
from moeflow.methods.recipes import tune as tuning
from moeflow.methods.recipes.compare import HeldOut
from moeflow.methods.recipes.tune import FineTuning
from moeflow.sources import Source, Texts
from moeflow.step import Step

MODEL = "mistralai/Mixtral-8x7B-v0.1"
C4 = "hf://datasets/allenai/c4@main/en/c4-train.00000-of-01024.json.gz#text"
WIKITEXT2 = "hf://datasets/Salesforce/wikitext@main/wikitext-2-raw-v1/test-00000-of-00001.parquet#text"


def build(
    model: Source = MODEL,
    *,
    tokens: Texts = Texts(C4),
    heldout: HeldOut = HeldOut(WIKITEXT2, bos=False),
    keep: int = 6,
    search: Search = Search("layerwise", seed=42),
    skipping: Skipping | None = None,
    tune: FineTuning | None = None,
    gang: Gang = Gang(zero=3, checkpointing=True),
    calibration: Calibrating = Calibrating(seed=42, group=1000, shard=128),
) -> Step:
    original = checkpoint.pinned(model)
    matrix = data.tokens(tokens, original, calibration.sample)
    calibrated = calibrate.run(original, matrix, calibration.passed)
    pruned = naee.prune(calibrated, keep, search)
    tuned = tuning.tuned(pruned, original, tune, gang, calibration.passed)
    served = naee.skipped(tuned.model, matrix, skipping, calibration.passed)
    reports = compare.reports(original, served, heldout, calibration.passed, tokens=matrix)
    return checkpoint.checkpoint_of(served).reporting(*tuned.reports, *reports)


if __name__ == "__main__":
    main(build)
