"""DeepSeek-V2-Lite by MoE-I² (Yang et al., EMNLP Findings 2024, arXiv 2411.01016): fewer experts, and then low-rank ones.

    ray job submit --working-dir . -- python pipelines/deepseek_v2_lite.py --store s3://bucket/prefix --gpus 1

The constants are the paper's, as in `mixtral_moei2.py`: a quarter of a layer's 64 experts is dropped on average, no shared expert
and nothing of the dense first layer; 53.98 % of the routed experts' parameters go in the end.

Each expert of each layer is left out once to measure how far the model's predictions move (`importance`), on 4,096 tokens, since
all these models run to the end. `-p counts.importance=recon -p decomposition.importance=recon` looks at the layers' own outputs
instead.
"""

from functools import partial

from mixtral_moei2 import build as moei2

from moeflow.cli import main
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.prune.counts import Counts

build = partial(
    moei2,
    model="deepseek-ai/DeepSeek-V2-Lite",
    removed=0.5398,
    counts=Counts(0.75, rule="paper", measured=4096),
    decomposition=Decomposition(svd="vanilla", ranks="paper", measured=4096),
)

if __name__ == "__main__":
    main(build)
