"""The scores by which single experts are kept. Each costs nothing beside a calibration. No torch.

Adding one: a file beside this one with a function (layer, statistics, seed) -> score_E, and a row below.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """One score of single experts; the experts of the highest score stay."""

    needs: tuple[str, ...]
    """What the score reads of a calibration: sums over tokens, by the names that `moeflow.model.observe.Recorder` gives them."""
    weights: bool
    """Whether the score reads the layer's weights; if not, its function may get None for the layer."""
    code: str
    """The function, as module:name."""


SCORES = {
    "random": Score(("count_E",), False, "moeflow.methods.scores.functions:random_order"),
    "frequency": Score(("count_E",), False, "moeflow.methods.scores.functions:frequency"),
    "router_score": Score(("score_E", "tokens"), False, "moeflow.methods.scores.functions:router_score"),
    "reap": Score(("reap_E", "count_E"), False, "moeflow.methods.scores.functions:reap"),
    "aimer": Score((), True, "moeflow.methods.scores.functions:aimer"),
}


def check_score(name: str) -> None:
    """Raise ValueError, with the known scores, for the name of none."""
    if name not in SCORES:
        raise ValueError(f"criterion={name!r} is not known; choose one of {', '.join(SCORES)}")
