"""A pipeline for tests of bad inputs: it reads a model and, if there is one, a text, and changes nothing."""

from moeflow.cli import main
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Sample
from moeflow.sources import Source, Texts
from moeflow.step import Step


def build(model: Source, *, tokens: Texts | None = None, sequences: int = 1, length: int = 8) -> Step:
    original = checkpoint.pinned(model)
    target = checkpoint.checkpoint_of(original)
    return target if tokens is None else target.reporting(data.tokens(tokens, original, Sample(sequences, length)))


if __name__ == "__main__":
    main(build)
