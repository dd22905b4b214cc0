"""Mixtral 8x7B by the unified framework (He et al., arXiv 2406.02500): trim its structure, quantize its experts.

    ray job submit --working-dir . -- python pipelines/mixtral_unified.py --store s3://bucket/prefix --gpus 1

The paper's settings (Table 3; L8/32: 8 of 32 MoE blocks dropped, B5/32: 5 of 32 decoder layers, E2/8: 2 of 8 experts of a
layer). Without options: L8/32 + AWQ, the paper's main result. B5/32 + AWQ with the authors' own rule: `-p trim=decoder_layers
-p trim.dropped=5 -p trim.rule=discrete`; without `trim.rule` adjacent layers are dropped. E2/8 + AWQ: `-p trim=experts -p
trim.dropped=2`, two experts of a layer on average across the model. 128 sequences of 2,048 tokens of C4; 4 bits in groups of
128.

The paper quantizes first; `-p order=trim,slim` trims first. `-p slim=gptq`, `sparsegpt`, `wanda` and so on take another method;
`-p slim=none` skips slimming, `-p trim=none` skips trimming. `-p slim.inputs=sequential` calibrates each layer behind the
slimmed layers before it; with it `-p slim.target=model` lets the last matrix of each expert make up for what the matrices and
layers before it lost (after Li et al., GPTAQ, arXiv 2504.02692). `-p slim=gptq -p slim.activation_order=true` quantizes the
columns with the most input energy first (act-order), `-p slim.tasks=8` splits each layer's experts over eight Ray tasks, with
the same result. `-p order=trim,tune,slim -p tune=full` fine-tunes the trimmed model before it is quantized.

What moeflow puts beside it: `-p order=decompose,slim -p slim=gptq -p slim.group=32 -p slim.inputs=sequential
-p slim.activation_order=true` takes three tenths of the experts' parameters away by rank and packs the factors in 4 bits. On the
model measured in benchmarks/RESULTS.md that is 0.53 times as far from the original as GPTQ at 3 bits, at 0.98 times its bytes.
Groups of 32 are part of it: with larger ones the factors lose more than the ranks have saved.
"""

from mixtral import C4, MODEL, WIKITEXT2

from moeflow.cli import main
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.finetune.recipe import Gang
from moeflow.methods.graph import Calibrating
from moeflow.methods.recipes import compare, unified
from moeflow.methods.recipes.compare import HeldOut
from moeflow.methods.recipes.tune import FineTuning
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.trim.steps import Trimming
from moeflow.sources import Source, Texts
from moeflow.step import Step


def build(
    model: Source = MODEL,
    *,
    tokens: Texts = Texts(C4),
    heldout: HeldOut = HeldOut(WIKITEXT2, bos=False),
    order: str = "slim,trim",
    trim: Trimming | None = Trimming("moe_blocks", 8),
    slim: Slimming | None = Slimming("awq"),
    decompose: Decomposition | None = Decomposition(0.3, multiple=32),
    tune: FineTuning | None = None,
    gang: Gang = Gang(zero=3, checkpointing=True),
    calibration: Calibrating = Calibrating(seed=42, group=1000, record=65_536, per_expert=64),
) -> Step:
    original = checkpoint.pinned(model)
    matrix = data.tokens(tokens, original, calibration.sample)
    made = unified.compress(
        original, matrix, calibration.passed, order=order, trim=trim, slim=slim, decompose=decompose, tune=tune, gang=gang
    )
    reports = compare.reports(original, made.model, heldout, calibration.passed, tokens=matrix)
    return checkpoint.checkpoint_of(made.model).reporting(*made.reports, *reports)


if __name__ == "__main__":
    main(build)
