"""A pipeline for tests: experts taken out of every layer, as many of each, and the others made low-rank or packed if so asked."""

from moeflow.cli import main
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.decompose.options import Decomposition
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import naee, unified
from moeflow.methods.slim.methods import Slimming
from moeflow.sources import Source, Texts
from moeflow.step import Step


def build(
    model: Source, *, tokens: Texts, keep: int = 6, decompose: Decomposition | None = None, slim: Slimming | None = None
) -> Step:
    original, passed = checkpoint.pinned(model), Pass(batch=4, shard=8, stage=3)
    matrix = data.tokens(tokens, original, Sample(8, 16))
    pruned = naee.prune(calibrate.run(original, matrix, passed), keep, Search("frequency", seed=3))
    made = unified.compress(pruned, matrix, passed, order="decompose,slim", decompose=decompose, slim=slim)
    return checkpoint.checkpoint_of(made.model)


if __name__ == "__main__":
    main(build)
