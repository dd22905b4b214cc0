"""Whole-model pruning by NAEE (Lu et al., ACL 2024, arXiv 2402.14800), and by the scores that stand beside it.

Every search has the same signature, so that a pipeline picks one from a table. Only graphs are built here.
"""

from collections.abc import Callable
from functools import partial

from moeflow.arch import Family
from moeflow.methods import rewrite
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.fewer_active.steps import check, skip
from moeflow.methods.graph import Calibration, Model, Pass
from moeflow.methods.prune.steps import choose
from moeflow.methods.prune.subsets import ENUMERATE
from moeflow.methods.records import CRITERIA
from moeflow.step import Part, Step


def layerwise(calibration: Calibration, *, keep: int, loss: str = "frobenius", seed: int = 0) -> Model:
    """Every layer alone, exactly: the subset of `keep` experts that changes the layer's output least (NAEE, section 3.2).

    `loss`: "frobenius", the norm of the change over all tokens (the paper), or "batch-sum", the sum over batches of their norms
    (the authors' code). Gives the pruned model.
    """
    return by_criterion(calibration, criterion=ENUMERATE, keep=keep, loss=loss, seed=seed)


def by_criterion(calibration: Calibration, *, criterion: str, keep: int, loss: str = "frobenius", seed: int = 0) -> Model:
    """Every layer alone, by one criterion of `moeflow.methods.scores`: the experts with the highest score stay."""
    model, config = calibration.model, calibration.model.essential
    choices, dropped = {}, {}
    for i, parts in calibration.observed.items():
        choices[i] = _chosen(calibration, i, parts, (), criterion=criterion, keep=keep, loss=loss, seed=seed)
        dropped[i] = rewrite.experts(config, model.layers[i], choices[i], layer=i, keep=keep)
    return model.with_layers(dropped, tuple(choices.values()))


def progressive(calibration: Calibration, *, keep: int, loss: str = "frobenius", seed: int = 0) -> Model:
    """Layer after layer, each seeing what the already pruned ones below give it, against the original's output (NAEE, Table 6)."""
    model = calibration.model
    choices: list[Step] = []

    def pruned(layer: int, file: Step, seen: tuple[Part, ...]) -> Step:
        originals = calibration.observed[layer]
        choices.append(_chosen(calibration, layer, seen, originals, criterion=ENUMERATE, keep=keep, loss=loss, seed=seed))
        return rewrite.experts(model.essential, file, choices[-1], layer=layer, keep=keep)

    dropped = calibrate.in_sequence(calibration, pruned)
    return model.with_layers(dropped, tuple(choices))


SEARCHES: dict[str, Callable[..., Model]] = {
    "layerwise": layerwise,
    "progressive": progressive,
    **{name: partial(by_criterion, criterion=name) for name in CRITERIA},
}
"""Every way to choose, by the name that `-p search=` takes."""


def named(name: str) -> Callable[..., Model]:
    """The search of this name. Raises ValueError, with the known ones, where there is none."""
    if name not in SEARCHES:
        raise ValueError(f"search={name!r} is not known; choose one of {', '.join(SEARCHES)}")
    return SEARCHES[name]


def _chosen(
    calibration: Calibration, layer: int, seen: tuple[Part, ...], originals: tuple[Part, ...],
    *, criterion: str, keep: int, loss: str, seed: int,
) -> Step:  # fmt: skip
    model = calibration.model
    batch_tokens = calibration.batch * calibration.tokens.spec.output.length if loss == "batch-sum" else 0
    return choose(
        model.essential, model.layers[layer], *seen, *originals,
        layer=layer, keep=keep, criterion=criterion, loss=loss, batch_tokens=batch_tokens, seed=seed, dtype=calibration.dtype,
        targets=len(seen) if originals else 0,
    )  # fmt: skip


def skipped(name: str) -> Callable[..., Model]:
    """What `-p skip=` names, as a function of (model, tokens, passed): the model that is served.

    "none"; "median", the paper's rule; or a number, the mean of a token's experts. Raises ValueError for any other word.
    """
    if name == "none":
        return lambda model, tokens, passed: model
    try:
        active = 0.0 if name == "median" else float(name)
    except ValueError:
        raise ValueError(f"skip={name!r} is not known; say none, median, or how many experts a token has on average") from None
    if name != "median" and active < 1:
        raise ValueError(f"skip={name}: a token has at least one expert")
    return partial(_calibrated, active=active)


def _calibrated(model: Model, tokens: Step, passed: Pass, *, active: float) -> Model:
    family = Family.of(model.config)
    check(family, family.top_k, active)  # before a graph is built for it
    return skip(calibrate.run(model, tokens, passed, inputs=False), active=active)
