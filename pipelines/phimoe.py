"""Phi-3.5-MoE with Compressed Experts (He et al., EMNLP Findings 2025, arXiv 2503.00634): one expert a token instead of two.

    ray job submit --working-dir . -- python pipelines/phimoe.py --store s3://bucket/prefix --gpus 1

The constants are the paper's, as in `olmoe.py`, with a rate of 1e-5. Active parameters fall from 6.64 B to 4.12 B, counted from the
configuration; the paper prints 7.45 and 4.93 B, which is the count without grouped-query attention.

Training takes sixteen GPUs of 48 GB, with the optimizer in main memory.
"""

from dataclasses import replace
from functools import partial

from olmoe import TUNE
from olmoe import build as compressed

from moeflow.cli import main
from moeflow.methods.finetune.recipe import Gang

build = partial(
    compressed,
    model="microsoft/Phi-3.5-MoE-instruct",
    tune=replace(TUNE, rate=1e-5),
    gang=Gang(16, zero=3, offload=True, checkpointing=True),
)

if __name__ == "__main__":
    main(build)
