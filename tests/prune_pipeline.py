"""A pipeline for tests: three shards of tokens by three stages of one layer, then the exact search."""

from moeflow.cli import main
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.recipes import naee
from moeflow.sources import Source, Texts
from moeflow.step import Step


def build(model: Source, *, tokens: Texts, keep: int = 6) -> Step:
    original = checkpoint.pinned(model)
    matrix = data.tokens(tokens, original, Sample(12, 16))
    seen = calibrate.run(original, matrix, Pass(batch=2, shard=4, stage=1))
    return checkpoint.checkpoint_of(naee.prune(seen, keep=keep))


if __name__ == "__main__":
    main(build)
