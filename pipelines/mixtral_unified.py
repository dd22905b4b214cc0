"""Mixtral 8x7B by the unified framework (He et al., arXiv 2406.02500): its structure is trimmed, and its experts are quantized.

    ray job submit --working-dir . -- python pipelines/mixtral_unified.py --store s3://bucket/prefix --gpus 1

The paper's recipes (Table 3): as it stands L8/32 + AWQ, its headline; `-p trim=decoder_layers -p dropped=5` for B5/32 + AWQ, with
`-p rule=discrete` as the authors chose them for Mixtral; and `-p trim=experts -p dropped=2` for E2/8 + AWQ, two experts a layer on
average (`-p across=layer`: in each). 128 sequences of 2,048 tokens of C4; 4 bits in groups of 128. The paper quantizes first;
`-p order=trim,slim` is the other way. `-p slim=gptq`, `sparsegpt`, `wanda` and so on take another method, `-p slim=none` or
`-p trim=none` none. `-p inputs=sequential` calibrates each layer behind the slimmed ones before it, one after the other;
`-p slim=gptq -p tasks=8` divides the experts of each between eight tasks.

What moeflow puts beside it: `-p order=decompose,slim -p ratio=0.25 -p slim=gptq` makes the experts low-rank and packs their
factors: closer to the original than fewer bits at the same bytes (benchmarks/RESULTS.md).
"""

from typing import Literal

from mixtral import C4, MODEL, WIKITEXT2

from moeflow.cli import main
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.recipes import compare, unified
from moeflow.methods.slim.methods import Slimming
from moeflow.methods.trim.steps import Trimming
from moeflow.sources import Source, Texts
from moeflow.step import Step


def build(
    model: Source = MODEL,
    *,
    tokens: Texts = Texts(C4),
    heldout: Texts = Texts(WIKITEXT2),
    order: str = "slim,trim",
    trim: Literal["experts", "moe_blocks", "decoder_layers"] | None = "moe_blocks",
    dropped: float = 8,
    rule: Literal["discrete", "consecutive"] = "consecutive",
    across: Literal["model", "layer"] = "model",
    criterion: str = "router_score",
    slim: str | None = "awq",
    pattern: str = "2:4",
    bits: int = 4,
    group: int = 128,
    ratio: float = 0.25,
    inputs: str = "parallel",
    shared: bool = False,
    tasks: int = 1,
    sequences: int = 128,
    length: int = 2048,
    batch: int = 8,
    record: int = 65_536,
    per_expert: int = 64,
    bos: bool = True,
    heldout_sequences: int = 64,
    dtype: str = "auto",
    seed: int = 42,
) -> Step:
    original = checkpoint.pinned(model)
    matrix = data.tokens(tokens, original, Sample(sequences, length, seed=seed, bos=bos, group=1000))
    passed = Pass(batch=batch, record=record, per_expert=per_expert, dtype=dtype)
    small = unified.compress(
        original,
        matrix,
        passed,
        order=order,
        slim=slim and Slimming(slim, pattern, bits, group, inputs=inputs, shared=shared, tasks=tasks),
        trim=trim and Trimming(trim, dropped, across, criterion, rule=rule),
        decompose=Decomposition(ratio=ratio, multiple=group or 32),
    )
    judged = Sample(heldout_sequences, length), Pass(batch, 8 * batch, dtype=dtype)
    reports = compare.compare(original, small, heldout, *judged, tokens=matrix)
    return checkpoint.checkpoint_of(small).reporting(*reports)


if __name__ == "__main__":
    main(build)
