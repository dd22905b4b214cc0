"""The whole of moeflow in minutes on a laptop: train a small Mixtral on Python's own sources, then take half its experts out.

    make demo

The same graph as `mixtral.py`, on a model that a step of the graph trains.
"""

from moeflow.cli import main
from moeflow.methods import calibrate, drop, evaluate, pretrain, search
from moeflow.methods import tokens as text
from moeflow.step import Step
from moeflow.store.texts import Texts

TRAINED_ON = "python:stdlib/[!s-z]*.py"
HELD_OUT = "python:stdlib/[s-z]*.py"


def build(
    texts: Texts = Texts(TRAINED_ON),
    *,
    heldout: Texts = Texts(HELD_OUT),
    keep: int = 6,
    steps: int = 300,
    loss: str = "frobenius",
    seed: int = 0,
) -> Step:
    original = pretrain.mixtral(texts, steps=steps, seed=seed)
    matrix = text.of(texts, original, sequences=64, length=128, seed=seed)
    seen = calibrate.run(original, matrix, batch=8, shard=32, stage=2)
    pruned = search.layerwise(seen, keep=keep, loss=loss, seed=seed)
    reports = evaluate.compare(seen, pruned, heldout=heldout, sequences=64, length=128)
    return drop.checkpoint_of(pruned).reporting(*reports)


if __name__ == "__main__":
    main(build)
