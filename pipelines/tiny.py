"""The whole of moeflow in a minute on a laptop: drop a quarter of the experts of the small Mixtral in models/mixtral-small.

    make demo

The graph is that of `mixtral.py`, on a model that has learned the sources of Python (models/mixtral-small/README.md), with what
each of the two models writes behind a few words.
"""

from pathlib import Path

from moeflow.cli import main
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.evaluate import steps as evaluate
from moeflow.methods.graph import Calibrating
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import compare, naee
from moeflow.methods.recipes.compare import HeldOut
from moeflow.sources import Source, Texts
from moeflow.step import Step

MODEL = str(Path(__file__).parents[1] / "models" / "mixtral-small")
TRAINED_ON = "python:stdlib/[!s-z]*.py"
HELD_OUT = "python:stdlib/[s-z]*.py"


def build(
    model: Source = MODEL,
    *,
    tokens: Texts = Texts(TRAINED_ON),
    heldout: HeldOut = HeldOut(HELD_OUT, length=128, bos=False),
    keep: int = 6,
    search: Search = Search("layerwise"),
    prompt: str = "    def __init__(self",
    calibration: Calibrating = Calibrating(64, 128, stage=2),
) -> Step:
    original = checkpoint.pinned(model)
    matrix = data.tokens(tokens, original, calibration.sample)
    pruned = naee.prune(calibrate.run(original, matrix, calibration.passed), keep, search)
    reports = compare.reports(original, pruned, heldout, calibration.passed, tokens=matrix)
    written = evaluate.written(checkpoint.checkpoint_of(original), checkpoint.checkpoint_of(pruned), prompt=prompt, tokens=24)
    return checkpoint.checkpoint_of(pruned).reporting(*reports, written)


if __name__ == "__main__":
    main(build)
