"""DeepSeek-V2-Lite by the unified framework (He et al., arXiv 2406.02500): trim its structure, quantize its experts.

    ray job submit --working-dir . -- python pipelines/deepseek_v2_lite_unified.py --store s3://bucket/prefix --gpus 1

The constants are the paper's for DeepSeek-MoE-16B, with the options of `mixtral_unified.py`: drop four MoE blocks, 4 bits in groups
of 64. `-p trim=decoder_layers` drops decoder layers instead, and `-p trim=experts -p trim.dropped=16` a quarter of the experts.
"""

from functools import partial

from mixtral_unified import build as unified

from moeflow.cli import main
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.trim.steps import Trimming

build = partial(
    unified,
    model="deepseek-ai/DeepSeek-V2-Lite",
    trim=Trimming("moe_blocks", 4),
    slim=Slimming("awq", group=64),
)

if __name__ == "__main__":
    main(build)
