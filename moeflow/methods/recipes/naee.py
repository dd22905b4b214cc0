"""Whole-model pruning by NAEE (Lu et al., ACL 2024, arXiv 2402.14800), and by the other searches and scores.

Only builds graphs.
"""

from moeflow.arch import Family
from moeflow.methods import rewrite
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.fewer_active.steps import Skipping, check, skip
from moeflow.methods.graph import Calibration, Model, Pass
from moeflow.methods.predict.steps import predicted
from moeflow.methods.prune.searches import LAYERWISE, PROGRESSIVE, SUBSET_SEARCHES, Search
from moeflow.methods.prune.steps import candidates, choose, pick
from moeflow.methods.recipes.sequence import in_sequence
from moeflow.methods.scores import SCORES
from moeflow.step import Part, Step


def prune(calibration: Calibration, keep: int, how: Search = Search(LAYERWISE)) -> Model:
    """Build the graph of the model with `keep` experts in every layer.

    The method "layerwise" prunes every layer alone: it keeps the subset that changes the layer's output least (section 3.2).
    "progressive" prunes one layer after the other, on the outputs of the pruned layers before it, against the original's output
    (Table 6). Any other search keeps the best set that it finds in every layer, and a score keeps the highest experts.

    Prediction layers that are to be pruned keep as many, by the same method, on what they record behind the original model.
    """
    if how.method not in SCORES:
        calibration.check_states(f"search={how.method}")
    calibration = predicted(calibration)
    model, dtype = calibration.model, calibration.dtype
    batch_tokens = how.batch * calibration.tokens.spec.output.length if how.loss == "batch-sum" else None
    if batch_tokens and (shard := calibration.passed.shard) % how.batch:
        raise ValueError(f"shard={shard} sequences are no whole batches of search.batch={how.batch}, over which 'batch-sum' sums")

    def choice(layer: int, recorded: tuple[Part, ...], originals: tuple[Part, ...] = ()) -> Step:
        config, file = model.essential, model.layer(layer)
        if how.method in SUBSET_SEARCHES:
            search = how.for_candidates()
            return pick(candidates(config, file, recorded, at=layer, keep=[keep], protected=[], how=search, dtype=dtype), keep=keep)
        return choose(
            config, file, recorded, originals,
            at=layer, keep=keep, how=how.for_choice(), batch_tokens=batch_tokens, dtype=dtype,
        )  # fmt: skip

    behind = {i: choice(i, recorded) for i, recorded in calibration.predicted.items()}
    if how.method != PROGRESSIVE:
        return rewrite.pruned(model, {i: choice(i, _read_by(calibration, i, how)) for i in model.moe_layers} | behind)
    model.check_keep(keep)
    choices: list[Step] = []

    def pruned(layer: int, file: Step, recorded: tuple[Part, ...]) -> Step:
        choices.append(choice(layer, recorded, calibration.observed[layer]))
        return rewrite.experts(model.essential, file, choices[-1], layer=layer, keep=keep)

    layers, _ = in_sequence(calibration, pruned)
    return rewrite.pruned(model.with_layers(layers, tuple(choices)), behind)


def _read_by(calibration: Calibration, layer: int, how: Search) -> tuple[Part, ...]:
    """What a layer's choice is made from: what a pass recorded, or for a score what an engine counted, if that is enough."""
    if how.method not in SCORES:
        return calibration.observed[layer]
    needs = SCORES[how.method].needs
    if not how.measured:
        return calibration.counted(layer, needs, f"search={how.method}")
    if needs and calibration.traffic and calibration.tokens.spec.output.gives(needs):
        raise ValueError(
            f"search.measured={how.measured} measures on tokens, and search={how.method} is counted by an engine; leave it out"
        )
    calibration.check_states(f"search.measured={how.measured}")
    return calibration.observed[layer]


def skipped(model: Model, tokens: Step, how: Skipping | None, passed: Pass) -> Model:
    """The model that is served: with dynamic skipping, calibrated on these tokens, or as it is."""
    if how is None:
        return model
    check(Family.of(model.config), how)  # before a graph is built for it
    if not tokens.spec.output.sequences:
        raise ValueError(
            f"{tokens.spec.output.where}, and skipping is calibrated on tokens; give them with it, or leave skipping out"
        )
    return skip(calibrate.run(model, tokens, passed, inputs=False), how)
