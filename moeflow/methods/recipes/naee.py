"""Whole-model pruning by NAEE (Lu et al., ACL 2024, arXiv 2402.14800), and by the searches and scores that stand beside it.

Only graphs are built here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from moeflow.arch import arch_of
from moeflow.methods import graph, rewrite
from moeflow.methods.calibrate import steps as calibrate
from moeflow.methods.fewer_active.steps import check, skip
from moeflow.methods.graph import Calibration, Model
from moeflow.methods.prune.searches import LAYERWISE, PROGRESSIVE, SUBSET_SEARCHES, Search
from moeflow.methods.prune.steps import candidates, choose, pick
from moeflow.step import Part, Step


def prune(calibration: Calibration, keep: int, how: Search = Search(LAYERWISE)) -> Model:
    """The model with `keep` experts in every layer.

    With the method "layerwise" every layer is pruned alone: the subset stays that changes the layer's output least (section 3.2).
    With "progressive" they are pruned one after the other, each on what the pruned layers below give it, against the original's
    output (Table 6). With another search every layer keeps the best set that it finds, with a score the experts that score highest.
    """
    if how.method == PROGRESSIVE:
        return _progressive(calibration, keep, how)
    model, config = calibration.model, calibration.model.essential
    choices, pruned = {}, {}
    for i, parts in calibration.observed.items():
        choices[i] = (_searched if how.method in SUBSET_SEARCHES else _chosen)(calibration, i, parts, keep=keep, how=how)
        pruned[i] = rewrite.experts(config, model.layers[i], choices[i], layer=i, keep=keep)
    return model.with_layers(pruned, tuple(choices.values()))


def _progressive(calibration: Calibration, keep: int, how: Search) -> Model:
    model, config = calibration.model, calibration.model.essential
    batch, dtype = calibration.batch, calibration.dtype
    pruned: dict[int, Step] = {}
    choices: list[Step] = []
    hidden = calibration.starts
    for i, layer in enumerate(model.layers):
        if i in calibration.observed:
            seen = tuple(
                calibrate.observe(
                    config, h, layer,
                    layers=[i], batch=batch, record=calibration.recorded, per_expert=0, residual=False, between=False, dtype=dtype,
                ).part(graph.file_of(i))
                for h in hidden
            )  # fmt: skip
            choices.append(_chosen(calibration, i, seen, calibration.observed[i], keep=keep, how=how))
            layer = pruned[i] = rewrite.experts(config, layer, choices[-1], layer=i, keep=keep)
        hidden = tuple(calibrate.advance(config, h, layer, layers=[i], batch=batch, dtype=dtype) for h in hidden)
    return model.with_layers(pruned, tuple(choices))


def _chosen(
    calibration: Calibration, layer: int, seen: tuple[Part, ...], originals: tuple[Part, ...] = (), *, keep: int, how: Search
) -> Step:
    model = calibration.model
    batch_tokens = calibration.batch * calibration.tokens.spec.output.length if how.loss == "batch-sum" else None
    return choose(
        model.essential, model.layers[layer], seen, originals,
        at=layer, keep=keep, how=how.for_choice(), batch_tokens=batch_tokens, dtype=calibration.dtype,
    )  # fmt: skip


def _searched(calibration: Calibration, layer: int, seen: tuple[Part, ...], *, keep: int, how: Search) -> Step:
    model = calibration.model
    sets = candidates(
        model.essential, model.layers[layer], seen,
        at=layer, keep=[keep], protected=[], how=how.for_candidates(), dtype=calibration.dtype,
    )  # fmt: skip
    return pick(sets, keep=keep)


def skipped(name: str) -> Callable[..., Model]:
    """What `-p skip=` names, as a function of (model, tokens, **options of `calibrate.run`): the model that is served.

    "none"; "median", the paper's rule; or a number, the mean of a token's experts. Raises ValueError for any other word.
    """
    if name == "none":
        return lambda model, tokens, **options: model
    try:
        active = 0.0 if name == "median" else float(name)
    except ValueError:
        raise ValueError(f"skip={name!r} is not known; say none, median, or how many experts a token has on average") from None
    if name != "median" and active < 1:
        raise ValueError(f"skip={name}: a token has at least one expert")
    return partial(_calibrated, active=active)


def _calibrated(model: Model, tokens: Step, *, active: float, **options: Any) -> Model:
    arch = arch_of(model.config)
    check(arch, arch.top_k(model.config), active)  # before a graph is built for it
    return skip(calibrate.run(model, tokens, **(options | {"record": 0, "per_expert": 0})), active=active)
