"""What `pipelines/mixtral_unified.py` does to the experts without its reports, since the peers beside it measure nothing either."""

from moeflow.cli import main
from moeflow.methods.checkpoint import steps as checkpoint
from moeflow.methods.data import steps as data
from moeflow.methods.graph import Calibrating
from moeflow.methods.recipes import unified
from moeflow.methods.slim.methods import Slimming
from moeflow.sources import Source, Texts
from moeflow.step import Step


def build(model: Source, *, tokens: Texts, slim: Slimming = Slimming("gptq"), calibration: Calibrating = Calibrating()) -> Step:
    original = checkpoint.pinned(model)
    matrix = data.tokens(tokens, original, calibration.sample)
    return checkpoint.checkpoint_of(unified.compress(original, matrix, calibration.passed, order="slim", slim=slim).model)


if __name__ == "__main__":
    main(build)
