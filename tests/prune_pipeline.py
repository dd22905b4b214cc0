"""A pipeline for tests: three shards of tokens by three stages of one layer, then the exact search."""

from moeflow.cli import main
from moeflow.methods import calibrate, drop, fetch, search
from moeflow.methods import tokens as text
from moeflow.step import Step
from moeflow.store.sources import Source
from moeflow.store.texts import Texts


def build(model: Source, *, tokens: Texts, keep: int = 6) -> Step:
    original = fetch.pinned(model)
    matrix = text.of(tokens, original, sequences=12, length=16)
    seen = calibrate.run(original, matrix, batch=2, shard=4, stage=1)
    return drop.checkpoint_of(search.layerwise(seen, keep=keep))


if __name__ == "__main__":
    main(build)
