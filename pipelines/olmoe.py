"""OLMoE-1B-7B with Compressed Experts (He et al., EMNLP Findings 2025, arXiv 2503.00634): four experts a token, not eight.

    ray job submit --working-dir . -- python pipelines/olmoe.py --store s3://bucket/prefix --gpus 1

The constants are the paper's: half of a token's experts are computed, three vectors stand in for each of the others, and all is
trained together: AdamW at 2e-5 with a cosine and 3 % of warm-up, 128 sequences of 4,096 tokens a step, two epochs. The paper trains
on one text for each task; `-p tune.text=magicoder` or `tulu3` are its others. Active parameters fall from 1.28 B to 879 M, counted
from the configuration; the paper prints 878 M. Training takes eight GPUs of 48 GB (`-p gang.processes=...`).

What moeflow puts beside it: `-p tune=compressed_experts` trains the vectors alone, `-p tune.loss=kl` distils from the original.
"""

from mixtral import WIKITEXT2

from moeflow.cli import main
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.fewer_active import steps as fewer_active
from moeflow.methods.fewer_active.steps import CompressedExperts
from moeflow.methods.finetune.recipe import Gang
from moeflow.methods.graph import Pass
from moeflow.methods.recipes import compare
from moeflow.methods.recipes import tune as tuning
from moeflow.methods.recipes.compare import HeldOut
from moeflow.methods.recipes.tune import FineTuning
from moeflow.sources import Source
from moeflow.step import Step

TUNE = FineTuning(
    "full", epochs=2, batch=128, rate=2e-5, warmup=0.03, text="mathinstruct", rows=12_800, length=4096, bos=False, seed=42
)


def build(
    model: Source = "allenai/OLMoE-1B-7B-0924",
    *,
    heldout: HeldOut = HeldOut(WIKITEXT2, length=4096, bos=False),
    vectors: CompressedExperts = CompressedExperts(),
    tune: FineTuning = TUNE,
    gang: Gang = Gang(8, zero=3, checkpointing=True),
    passed: Pass = Pass(),
) -> Step:
    original = checkpoint.pinned(model)
    tuned = tuning.tuned(fewer_active.attach(original, vectors), original, tune, gang, passed)
    reports = compare.reports(original, tuned.model, heldout, passed, tokens=tune.data(original))
    return checkpoint.checkpoint_of(tuned.model).reporting(*tuned.reports, *reports)


if __name__ == "__main__":
    main(build)
