"""Mixtral 8x7B, the experts that matter least taken out of every layer (Lu et al., "Not All Experts are Equal", ACL 2024).

    ray job submit --working-dir . -- python pipelines/mixtral.py --store s3://bucket/prefix --gpus 1 -p keep=6

The constants are the paper's: 128 sequences of 2,048 tokens of C4 in batches of 8, documents packed in groups of 1,000 with a
beginning-of-sequence token each, the checkpoint's own precision (bf16), every layer searched on its own.

`-p skip=median` adds the paper's dynamic skipping, calibrated on the pruned model: about half of the tokens then go through one
expert; `-p skip=1.7` sets how many experts a token has on average.
"""

from typing import Literal

from moeflow.cli import main
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, naee
from moeflow.sources import Source, Texts
from moeflow.step import Step

MODEL = "mistralai/Mixtral-8x7B-v0.1"
C4 = "hf://datasets/allenai/c4@main/en/c4-train.00000-of-01024.json.gz#text"
WIKITEXT2 = "hf://datasets/Salesforce/wikitext@main/wikitext-2-raw-v1/test-00000-of-00001.parquet#text"


def build(
    model: Source = MODEL,
    *,
    tokens: Texts = Texts(C4),
    heldout: Texts = Texts(WIKITEXT2),
    keep: int = 6,
    search: str = "layerwise",
    loss: Literal["frobenius", "batch-sum"] = "frobenius",
    batch: int = 8,
    sequences: int = 128,
    length: int = 2048,
    heldout_sequences: int = 64,
    skip: str = "none",
    dtype: str = "auto",
    seed: int = 42,
) -> Step:
    original = checkpoint.pinned(model)
    matrix = data.tokens(tokens, original, Sample(sequences, length, seed=seed, bos=True, group=1000))
    passed = Pass(batch=batch, dtype=dtype)
    seen = calibrate.run(original, matrix, passed)
    pruned = naee.prune(seen, keep, Search(search, loss=loss, seed=seed))
    served = naee.skipped(pruned, matrix, naee.skipping(skip), passed)
    judged = Sample(heldout_sequences, length), Pass(batch, 8 * batch, dtype=dtype)
    reports = compare.compare(original, served, heldout, *judged, tokens=matrix)
    return checkpoint.checkpoint_of(served).reporting(*reports)


if __name__ == "__main__":
    main(build)
