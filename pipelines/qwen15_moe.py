"""Qwen1.5-MoE-A2.7B by MoE-I² (Yang et al., EMNLP Findings 2024, arXiv 2411.01016): fewer experts, and then low-rank ones.

    ray job submit --working-dir . -- python pipelines/qwen15_moe.py --store s3://bucket/prefix --gpus 1

The constants are the paper's, as in `mixtral_moei2.py`: a quarter of the 60 experts of a layer goes on average, the shared one
never; what remains is cut to about half of the routed experts' parameters.

Every expert of every layer is left out once to see what the model loses (`importance`): on 4,096 tokens, since the hidden states of
all of these models are stored. `-p importance=recon` looks at the layers' own outputs and stores none.
Its tokenizer has no beginning-of-sequence token.
"""

from functools import partial

from mixtral_moei2 import build as moei2

from moeflow.cli import main

build = partial(moei2, model="Qwen/Qwen1.5-MoE-A2.7B", measured=4096, bos=False)

if __name__ == "__main__":
    main(build)
