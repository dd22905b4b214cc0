"""Qwen1.5-MoE-A2.7B by the unified framework (He et al., arXiv 2406.02500): trim its structure, quantize its experts.

    ray job submit --working-dir . -- python pipelines/qwen15_moe_unified.py --store s3://bucket/prefix --gpus 1

Like `mixtral_unified.py`, with the paper's numbers for a fine-grained model (DeepSeek-MoE-16B): drop four MoE blocks, 4 bits in
groups of 64. The model's tokenizer has no beginning-of-sequence token.
"""

from functools import partial

from deepseek_v2_lite_unified import build as unified

from moeflow.cli import main
from moeflow.methods.graph import Calibrating

build = partial(
    unified,
    model="Qwen/Qwen1.5-MoE-A2.7B",
    calibration=Calibrating(bos=False, seed=42, group=1000, record=65_536, per_expert=64),
)

if __name__ == "__main__":
    main(build)
