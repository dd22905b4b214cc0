"""The scores that rank single experts. None costs more than a calibration. No torch.

To add one, write a function (layer, statistics, seed) -> score_E in a file beside this one, and add a row below.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """One score of single experts; the experts with the highest scores stay."""

    needs: tuple[str, ...]
    """What the score reads from a calibration: sums over tokens, by their names in `moeflow.model.observe.Recorder`."""
    weights: bool
    """Does the score read the layer's weights? If not, its function may get None for the layer."""
    code: str
    """The function, as module:name."""


SCORES = {
    "random": Score(("count_E",), False, "moeflow.methods.scores.functions:random_order"),
    "frequency": Score(("count_E",), False, "moeflow.methods.scores.functions:frequency"),
    "router_score": Score(("score_E", "tokens"), False, "moeflow.methods.scores.functions:router_score"),
    "reap": Score(("reap_E", "count_E"), False, "moeflow.methods.scores.functions:reap"),
    "aimer": Score((), True, "moeflow.methods.scores.functions:aimer"),
}
OWN_SCORES = dict.fromkeys(("deepseek_v2", "deepseek_v3"), "routing_weight")
"""By what the authors of Expert Drop rank experts where it is no router score: a row of `DROP_SCORES` by model type."""
DROP_SCORES = SCORES | {"routing_weight": Score(("weight_E", "tokens"), False, "moeflow.methods.scores.functions:routing_weight")}
"""The scores for Expert Drop: these, and its authors' for DeepSeek, which no search has as a baseline."""
