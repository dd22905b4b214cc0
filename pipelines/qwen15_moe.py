"""Qwen1.5-MoE-A2.7B by MoE-I² (Yang et al., EMNLP Findings 2024, arXiv 2411.01016): fewer experts, and then low-rank ones.

    ray job submit --working-dir . -- python pipelines/qwen15_moe.py --store s3://bucket/prefix --gpus 1

The constants are the paper's, as in `mixtral_moei2.py`: on average a quarter of a layer's 60 experts is dropped, the shared one
always stays, and the rest is cut to about half of the routed experts' parameters.

Each expert of each layer is left out once to measure how far the model's predictions move (`importance`), on 4,096 tokens, since
all these models run to the end. `-p counts.importance=recon -p decomposition.importance=recon` looks at the layers' own outputs
instead. The tokenizer has no beginning-of-sequence token.
"""

from functools import partial

from mixtral_moei2 import build as moei2

from moeflow.cli import main
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.graph import Calibrating
from moeflow.methods.prune.counts import Counts
from moeflow.methods.recipes.tune import FineTuning

build = partial(
    moei2,
    model="Qwen/Qwen1.5-MoE-A2.7B",
    counts=Counts(0.75, rule="paper", measured=4096),
    decomposition=Decomposition(svd="vanilla", ranks="paper", measured=4096),
    tune=FineTuning(epochs=2, batch=64, rank=8, bos=False, seed=42),
    calibration=Calibrating(2048, bos=False, seed=42, group=1000, shard=256, stage=12, record=65_536, per_expert=256),
)

if __name__ == "__main__":
    main(build)
