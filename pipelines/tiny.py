"""The whole of moeflow in minutes on a laptop: train a small Mixtral on Python's own sources, then drop a quarter of its experts.

    make demo

The graph is that of `mixtral.py`, on a model that one of its steps trains.
"""

from moeflow.cli import main
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Calibrating
from moeflow.methods.pretrain.steps import Pretraining
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, naee, pretrained
from moeflow.methods.recipes.compare import HeldOut
from moeflow.sources import Texts
from moeflow.step import Step

TRAINED_ON = "python:stdlib/[!s-z]*.py"
HELD_OUT = "python:stdlib/[s-z]*.py"


def build(
    texts: Texts = Texts(TRAINED_ON),
    *,
    heldout: HeldOut = HeldOut(HELD_OUT, length=128),
    keep: int = 6,
    search: Search = Search("layerwise"),
    trained: Pretraining = Pretraining(),
    calibration: Calibrating = Calibrating(64, 128, stage=2),
) -> Step:
    original = pretrained.mixtral(texts, trained)
    matrix = data.tokens(texts, original, calibration.sample)
    pruned = naee.prune(calibrate.run(original, matrix, calibration.passed), keep, search)
    reports = compare.reports(original, pruned, heldout, calibration.passed, tokens=matrix)
    return checkpoint.checkpoint_of(pruned).reporting(*reports)


if __name__ == "__main__":
    main(build)
