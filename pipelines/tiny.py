"""The whole of moeflow in minutes on a laptop: train a small Mixtral on Python's own sources, then take half its experts out.

    make demo

The same graph as `mixtral.py`, on a model that a step of the graph trains.
"""

from typing import Literal

from moeflow.cli import main
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.pretrain.steps import Pretraining
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, naee, pretrained
from moeflow.sources import Texts
from moeflow.step import Step

TRAINED_ON = "python:stdlib/[!s-z]*.py"
HELD_OUT = "python:stdlib/[s-z]*.py"


def build(
    texts: Texts = Texts(TRAINED_ON),
    *,
    heldout: Texts = Texts(HELD_OUT),
    keep: int = 6,
    steps: int = 300,
    loss: Literal["frobenius", "batch-sum"] = "frobenius",
    seed: int = 0,
) -> Step:
    original = pretrained.mixtral(texts, Pretraining(steps, seed=seed))
    matrix = data.tokens(texts, original, Sample(64, 128, seed=seed))
    seen = calibrate.run(original, matrix, Pass(batch=8, shard=32, stage=2))
    pruned = naee.prune(seen, keep, Search("layerwise", loss=loss, seed=seed))
    reports = compare.compare(original, pruned, heldout, Sample(64, 128))
    return checkpoint.checkpoint_of(pruned).reporting(*reports)


if __name__ == "__main__":
    main(build)
