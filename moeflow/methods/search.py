"""Ways to prune the experts of a whole model. Every one has the same signature, so that a pipeline picks one from a table.

Each is a graph of `choose` and `drop` steps; nothing is computed here.
"""

from collections.abc import Callable
from functools import partial

from moeflow.methods import calibrate, drop
from moeflow.methods.calibrate import Calibration
from moeflow.methods.choose import CRITERIA, choose
from moeflow.methods.fetch import Model
from moeflow.methods.subsets import ENUMERATE
from moeflow.step import Part, Step


def layerwise(calibration: Calibration, *, keep: int, loss: str = "frobenius", seed: int = 0) -> Model:
    """Every layer alone, exactly: the subset of `keep` experts that changes the layer's output least (NAEE, section 3.2).

    `loss`: "frobenius", the norm of the change over all tokens (the paper), or "batch-sum", the sum over batches of their norms
    (the authors' code). Gives the pruned model.
    """
    return by_criterion(calibration, criterion=ENUMERATE, keep=keep, loss=loss, seed=seed)


def by_criterion(calibration: Calibration, *, criterion: str, keep: int, loss: str = "frobenius", seed: int = 0) -> Model:
    """Every layer alone, by one criterion of `moeflow.methods.criteria`: the experts with the highest score stay."""
    model, config = calibration.model, calibration.model.essential
    choices, dropped = {}, {}
    for i, parts in calibration.observed.items():
        choices[i] = _chosen(calibration, i, parts, (), criterion=criterion, keep=keep, loss=loss, seed=seed)
        dropped[i] = drop.experts(config, model.layers[i], choices[i], layer=i, keep=keep)
    return model.with_layers(dropped, tuple(choices.values()))


def progressive(calibration: Calibration, *, keep: int, loss: str = "frobenius", seed: int = 0) -> Model:
    """Layer after layer, each seeing what the already pruned ones below give it, against the original's output (NAEE, Table 6)."""
    model, config = calibration.model, calibration.model.essential
    batch, dtype = calibration.batch, calibration.dtype
    dropped: dict[int, Step] = {}
    choices: list[Step] = []
    hidden = calibration.starts
    for i, layer in enumerate(model.layers):
        if i in calibration.observed:
            seen = tuple(
                calibrate.observe(
                    config, h, layer,
                    layers=[i], batch=batch, record=calibration.recorded, per_expert=0, residual=False, between=False, dtype=dtype,
                ).part(calibrate.file_of(i))
                for h in hidden
            )  # fmt: skip
            choice = _chosen(calibration, i, seen, calibration.observed[i], criterion=ENUMERATE, keep=keep, loss=loss, seed=seed)
            choices.append(choice)
            layer = dropped[i] = drop.experts(config, layer, choice, layer=i, keep=keep)
        hidden = tuple(calibrate.advance(config, h, layer, layers=[i], batch=batch, dtype=dtype) for h in hidden)
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
