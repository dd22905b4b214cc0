"""What `pipelines/fit.py` does without its reports, since the peers beside it measure nothing either."""

from moeflow.cli import main
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.fit.options import Budget, Offers
from moeflow.methods.graph import Calibrating
from moeflow.methods.recipes import fit
from moeflow.sources import Source, Texts
from moeflow.step import Step


def build(
    model: Source, *, tokens: Texts, budget: Budget, offers: Offers = Offers(), calibration: Calibrating = Calibrating()
) -> Step:
    original = checkpoint.pinned(model)
    matrix = data.tokens(tokens, original, calibration.sample)
    return checkpoint.checkpoint_of(fit.compress(fit.calibrated(original, matrix, calibration.passed), budget, offers).model)


if __name__ == "__main__":
    main(build)
