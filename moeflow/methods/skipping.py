"""Dynamic skipping: a threshold for each layer below which a token leaves out its least experts, from what a calibration recorded.

NAEE (Lu et al., ACL 2024, arXiv 2402.14800), section 3.3 for two experts a token and appendix A.2 for more.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from moeflow.arch import Arch, arch_of
from moeflow.methods import calibrate
from moeflow.methods.calibrate import Calibration
from moeflow.methods.fetch import Model
from moeflow.model.layout import ROUTING, read_config
from moeflow.model.spec import LayerSpec, ObservedSpec, RestSpec, file_bytes
from moeflow.step import Artifact, Context, Spec, Step, step

SKIP = "skip.json"


def skip(calibration: Calibration, *, active: float = 0.0) -> Model:
    """The calibrated model with dynamic skipping in each of its MoE layers; no pass over the tokens is made for it.

    `active`: how many experts a token has on average in each layer, for which that layer's threshold is set; 0: the paper's rule
    for two experts a token, the median of the second weight over the first. Prune and decompose before: thresholds belong to the
    model that is served. Raises ValueError where the router gives one expert a token or weighs each by itself, for an `active` that
    is not between 1 and the router's number of experts, and for 0 where that is more than two.
    """
    model = calibration.model
    arch = arch_of(model.config)
    top_k = arch.top_k(model.config)
    check(arch, top_k, active)
    rule = "ratio" if top_k == 2 else "tail"
    skipping = {
        i: layer(model.essential, model.layers[i], *parts, layer=i, rule=rule, active=active)
        for i, parts in calibration.observed.items()
    }
    return model.with_layers(skipping)


def check(arch: Arch, top_k: int, active: float) -> None:
    """Raise ValueError where a router of `top_k` experts a token cannot have `active` on average by skipping."""
    if arch.score == "sparsemixer":
        raise ValueError(
            f"a {arch.model_type} weighs each of a token's experts by itself, nearly always by one, so that its weights do not say "
            "which can be skipped; attach Compressed Experts instead"
        )
    if top_k < 2:
        raise ValueError("the router gives each token one expert; none is left to skip")
    if active == 0 and top_k > 2:
        raise ValueError(
            f"the router gives each token {top_k} experts, for which there is no rule of a median; say how many stay (1 to {top_k})"
        )
    if active and not 1 <= active < top_k:
        raise ValueError(f"active={active:g} experts a token must be at least 1 and fewer than the router's {top_k}")


def stage(name: str) -> Callable[..., Model]:
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


def _layer_spec(rest: RestSpec, given: LayerSpec, *seen: ObservedSpec, layer: int, rule: str, active: float) -> Spec:
    given.check_routing("take")
    if arch_of(rest.config).reach(rest.config, given.least) < 2:
        raise ValueError(f"a token may get one expert of layer {layer} only, and none to skip; drop fewer experts")
    tokens = sum(s.hidden.sequences * s.hidden.length for s in seen)
    name = f"{arch_of(rest.config).experts(layer)}skip.{rule}"
    out = LayerSpec(
        rest.config, layer, given.experts, {**given.tensors, name: ("F32", ())}, given.share, given.fewest, given.slimmed
    )
    logits = tokens * given.experts * 4
    return Spec(out, reads=logits, writes=file_bytes({name: ("F32", ())}) + 300, memory=6 * logits + (1 << 28))


@step("skipping.layer", version=1, spec=_layer_spec)
def layer(context: Context, config: Artifact, given: Artifact, *seen: Artifact, layer: int, rule: str, active: float) -> None:
    """One layer's files, and beside them its threshold (`routing.safetensors`), with what it rests on in `skip.json`.

    `seen`: what each shard of tokens showed in this layer; `active` as in `skip`.
    """
    from moeflow.methods.thresholds import threshold
    from moeflow.model.checkpoint import save

    for name in given.names():
        context.link(given, name)
    read = read_config(config)
    value, about = threshold(read, given, seen, layer=layer, rule=rule, active=active)
    save({f"{arch_of(read).experts(layer)}skip.{rule}": value}, context.out / ROUTING)
    (context.out / SKIP).write_text(json.dumps({"layer": layer, "rule": rule, **about}) + "\n")
