"""Trimming: a model with fewer experts, without the MoE blocks of some layers, or without whole decoder layers, as graphs.

He et al., Demystifying the Compression of Mixture-of-Experts Through a Unified Framework (arXiv 2406.02500), section 4. Each
function takes a calibration and gives the trimmed model; what goes is decided by a step of its own (`trim_choices`), from what the
calibration recorded, and taken out by others (`trim_layers`). Nothing is computed here.
"""

from dataclasses import replace
from typing import Any

from moeflow.arch import Config, arch_of
from moeflow.methods import trim_choices, trim_layers
from moeflow.methods.calibrate import HIDDEN, Calibration
from moeflow.methods.fetch import Model, configured
from moeflow.model.formats import family_config

ACROSS = ("model", "layer")


def expert_drop(
    calibration: Calibration, *, keep: float, across: str = "model", criterion: str = "router_score", least: int = 0, seed: int = 0
) -> Model:
    """The model without the experts of the lowest score, as a graph (section 4.1, Expert Drop).

    `keep`: experts a layer keeps, on average where they are ranked `across` the "model", each where across its "layer";
    `criterion`: "router_score", the router's mean score as the authors take it of each family, or another of
    `moeflow.methods.criteria`; `least`: how many stay in every layer. Where fewer than top-k stay a token gets those; a layer that
    loses all keeps its shared expert, or nothing. Raises ValueError for what a router cannot do with.
    """
    model = calibration.model
    arch, layers = arch_of(model.config), model.moe_layers
    experts = {i: model.layers[i].spec.output.experts for i in layers}
    if across not in ACROSS:
        raise ValueError(f"across={across!r} is not known; choose one of {', '.join(ACROSS)}")
    if across == "layer" and keep != int(keep):
        raise ValueError(f"keep={keep} experts of each layer is no whole number; rank them across='model' for an average")
    average = sum(experts.values()) / max(1, len(layers))
    if not 0 <= keep <= average:
        raise ValueError(f"keep={keep} experts a layer must lie between 0 and the {average:g} that there are")
    if round(keep * len(layers)) < 1:
        raise ValueError(f"keep={keep} experts of {len(layers)} layers are none; at least one layer has to keep some")
    scores = {
        i: trim_choices.scores(
            model.essential,
            model.layers[i],
            *calibration.observed[i],
            layer=i,
            criterion=criterion,
            seed=seed,
            dtype=calibration.dtype,
        )
        for i in layers
    }
    groups, _ = arch.group_limit(model.config)
    common: dict[str, Any] = {"layers": layers, "groups": groups}
    if across == "layer":
        for i in layers if keep else ():
            arch.check_left(model.config, int(keep), model.layers[i].spec.output.least)
        chosen = trim_choices.in_layers(*scores.values(), keep=int(keep), **common)
        kept = {i: int(keep) for i in layers}
    else:
        most = min(experts.values())
        legal = next(n for n in range(1, most + 1) if _may_keep(arch, model.config, n, most))
        # what lies between none and the fewest that a router can do with is not to be had step by step
        least = max(least, legal if legal > groups else 0)
        total = -(-round(keep * len(layers)) // groups) * groups
        chosen = trim_choices.in_model(*scores.values(), keep=total, least=least, **common)
        kept = dict.fromkeys(layers, -1)
    dropped = {i: trim_layers.experts(model.essential, model.layers[i], chosen, layer=i, keep=kept[i], least=least) for i in layers}
    return model.with_layers(dropped, (chosen,))


def layer_drop(calibration: Calibration, *, drop: int) -> Model:
    """The model without the MoE blocks, and the norms before them, of `drop` layers, as a graph (section 4.2, Layer Drop).

    Those go that turn the residual stream least: of the highest mean cosine between it before and after norm and block, over all
    calibration tokens. Dense layers keep theirs. Raises ValueError where there are not more MoE layers than that.
    """
    model, layers = calibration.model, calibration.model.moe_layers
    if not 0 <= drop < len(layers):
        raise ValueError(f"drop={drop} must lie between 0 and {len(layers) - 1}: the model has {len(layers)} layers with experts")
    seen = [part for i in layers for part in calibration.observed[i]]
    chosen = trim_choices.blocks_of_experts(*seen, layers=layers, drop=drop)
    cut = {i: trim_layers.moe(model.essential, model.layers[i], chosen, layer=i) for i in layers}
    return model.with_layers(cut, (chosen,))


def block_drop(calibration: Calibration, *, drop: int, rule: str = "consecutive") -> Model:
    """The model with `drop` decoder layers fewer, renumbered, as a graph (section 4.3, Block Drop).

    `rule`: "discrete", the layers of the highest mean cosine between the hidden states before and behind one layer; "consecutive",
    the adjacent ones with the highest across all of them. Cosines are of the recorded tokens of a calibration with `between=True`.
    Dense layers at the beginning stay. The result is the family's own kind of model. Raises ValueError where the layers that
    are left would need another configuration according to which they are.
    """
    model, count = calibration.model, len(calibration.model.layers)
    if rule not in trim_choices.RULES:
        raise ValueError(f"rule={rule!r} is not known; choose one of {', '.join(trim_choices.RULES)}")
    moe = arch_of(model.config).moe_layers(model.config)
    if not 0 <= drop < len(moe):
        raise ValueError(f"drop={drop} must lie between 0 and {len(moe) - 1}: the model has {len(moe)} layers that may go")
    if not drop:
        return model
    if not calibration.between:
        raise ValueError("Block Drop compares hidden states across layers: calibrate with between=True")
    config, first = _shorter(model, moe, drop), moe[0]
    seen = [part for parts in calibration.between for part in parts]
    chosen = trim_choices.layers(
        *seen,
        *(end.part(HIDDEN) for end in calibration.ends),
        layers=count,
        first=first,
        drop=drop,
        rule=rule,
        tokens=calibration.recorded,
    )
    kept = [
        trim_layers.renumbered(chosen, *model.layers[i : i + drop + 1], config=config, first=i, to=i)
        if i >= first
        else model.layers[i]
        for i in range(count - drop)
    ]
    rest = configured(model.rest, config=config)
    return replace(model, config=config, rest=rest, layers=tuple(kept), choices=(*model.choices, chosen))


def _may_keep(arch: Any, config: Config, keep: int, experts: int) -> bool:
    try:
        arch.check_left(config, keep, experts)
    except ValueError:
        return False
    return True


def _shorter(model: Model, moe: list[int], drop: int) -> Config:
    """The configuration of the model with `drop` decoder layers fewer, whichever they are."""
    config, count = family_config(model.config), len(model.layers)
    if model.extra:
        raise ValueError("multi-token-prediction layers stand behind the last layer by its number; fetch the model with mtp='drop'")
    if config.get("use_sliding_window") and 0 < int(config.get("max_window_layers") or 0) < count:
        raise ValueError(
            f"max_window_layers={config['max_window_layers']}: attention differs by layer; a layer cannot take another's place"
        )
    shorter = config | {"num_hidden_layers": count - drop}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == count and name != "mlp_only_layers":
            if any(v != value[0] for v in value):
                raise ValueError(
                    f"{name} differs by layer: a layer cannot take another's place; drop MoE blocks (Layer Drop) instead"
                )
            shorter[name] = value[: count - drop]
    if arch_of(config).moe_layers(shorter) != list(range(moe[0], count - drop)):
        raise ValueError(
            f"layers {[i for i in range(moe[0], count) if i not in moe]} have no experts, and config.json tells them by number: "
            "another layer cannot take their place; drop MoE blocks (Layer Drop) instead"
        )
    return shorter
