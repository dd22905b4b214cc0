"""What `pipelines/mixtral.py` does without its reports, since the peers beside it measure nothing either."""

from moeflow.cli import main
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Calibrating
from moeflow.methods.prune.searches import Search
from moeflow.methods.recipes import naee
from moeflow.sources import Source, Texts
from moeflow.step import Step


def build(
    model: Source, *, tokens: Texts, keep: int = 6, search: Search = Search("reap"), calibration: Calibrating = Calibrating()
) -> Step:
    original = checkpoint.pinned(model)
    matrix = data.tokens(tokens, original, calibration.sample)
    return checkpoint.checkpoint_of(naee.prune(calibrate.run(original, matrix, calibration.passed), keep, search))


if __name__ == "__main__":
    main(build)
