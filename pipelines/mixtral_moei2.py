"""Mixtral 8x7B by MoE-I² (Yang et al., EMNLP Findings 2024, arXiv 2411.01016): fewer experts, and then low-rank ones.

    ray job submit --working-dir . -- python pipelines/mixtral_moei2.py --store s3://bucket/prefix --gpus 1

The constants are the paper's: a quarter of the experts is dropped, spread over layers by importance, found by a genetic search
(population 100, 50 generations) and chosen in spans of T=3 layers among K=3 sets each; the rest is cut to about half of the
experts' parameters by SVD, with ranks by importance at alpha 0.15. 2,048 sequences of 2,048 tokens of C4, of which eight tasks take
256 each through half of the model; spans compare their combinations on the first 65,536 tokens. Then LoRA on Alpaca; the paper's
rank, rate and epochs were not at hand, so those here are usual ones. It takes eight GPUs of 48 GB, as `ray_cluster.yaml` has them;
with one larger GPU say `-p gang.processes=1`. `-p tune=none` leaves it out.

The paper leaves open what importance is measured in. Here it is how far the predictions move without an expert; `-p
counts.importance=lm_loss -p decomposition.importance=lm_loss` takes the growth of the loss, `recon` the layer's own output.

What moeflow puts beside it: `-p counts.rule=exact -p search=swap -p search.span=1 -p decomposition.svd=whitened
-p decomposition.ranks=global`.
"""

from mixtral import C4, MODEL, WIKITEXT2

from moeflow.cli import main
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.finetune.recipe import Gang
from moeflow.methods.graph import Calibrating
from moeflow.methods.prune.counts import Counts
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, moei2
from moeflow.methods.recipes import tune as tuning
from moeflow.methods.recipes.compare import HeldOut
from moeflow.methods.recipes.tune import FineTuning
from moeflow.sources import Source, Texts
from moeflow.step import Step


def build(
    model: Source = MODEL,
    *,
    tokens: Texts = Texts(C4),
    heldout: HeldOut = HeldOut(WIKITEXT2, bos=False),
    removed: float = 0.5,
    counts: Counts = Counts(0.75, rule="paper"),
    search: Search = Search("genetic", span=3, seed=42, measured=65_536),
    decomposition: Decomposition = Decomposition(svd="vanilla", ranks="paper"),
    tune: FineTuning | None = FineTuning(epochs=2, batch=64, rank=8, seed=42),
    gang: Gang = Gang(8, zero=3, micro=4, checkpointing=True),
    calibration: Calibrating = Calibrating(2048, seed=42, group=1000, shard=256, stage=16, record=65_536, per_expert=256),
) -> Step:
    original = checkpoint.pinned(model)
    matrix = data.tokens(tokens, original, calibration.sample)
    small = moei2.compress(
        original, matrix, calibration.passed, counts=counts, search=search, removed=removed, decomposition=decomposition
    )
    tuned = tuning.tuned(small, original, tune, gang, calibration.passed)
    reports = compare.reports(original, tuned.model, heldout, calibration.passed, tokens=matrix)
    return checkpoint.checkpoint_of(tuned.model).reporting(*tuned.reports, *reports)


if __name__ == "__main__":
    main(build)
