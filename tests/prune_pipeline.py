"""A pipeline for tests: three shards of tokens by three stages of one layer, then the exact search.

The last layer's file, and so the last stage, waits until the file `until` is there.
"""

from moeflow.cli import main
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Pass, Sample
from moeflow.methods.recipes import naee
from moeflow.sources import Source, Texts
from moeflow.step import Step
from tests.run import toy


def build(model: Source, *, tokens: Texts, until: str, keep: int = 6) -> Step:
    original = checkpoint.pinned(model)
    original = original.with_layers({2: toy.gate(original.layers[2], until=until)})
    matrix = data.tokens(tokens, original, Sample(12, 16))
    seen = calibrate.run(original, matrix, Pass(batch=2, shard=4, stage=1))
    return checkpoint.checkpoint_of(naee.prune(seen, keep=keep))


if __name__ == "__main__":
    main(build)
