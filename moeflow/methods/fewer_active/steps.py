"""Fewer active experts per token: dynamic skipping and Compressed Experts.

NAEE (Lu et al., ACL 2024, arXiv 2402.14800), section 3.3 and appendix A.2, and Compressed Experts (He et al., EMNLP Findings 2025,
arXiv 2503.00634). Thresholds follow from what a calibration recorded; vectors begin as ones that change nothing, and are trained.
"""

import json
from dataclasses import replace

from moeflow.arch import MAIN, Config, Family
from moeflow.methods.graph import Calibration, Model
from moeflow.methods.records import SKIP
from moeflow.methods.rewrite import configured
from moeflow.model.formats import FORMS, Format, format_of, routing_shapes
from moeflow.model.layout import ESSENTIAL, ROUTING, headers, read_config
from moeflow.model.packed import PACKED, SCALE
from moeflow.model.spec import LayerSpec, ObservedSpec, RestSpec, TensorTable, file_bytes
from moeflow.step import Artifact, Context, Spec, step


def attach(model: Model, *, main: int = 0, form: str = "three") -> Model:
    """The model in which a token is computed by `main` of its k experts (0: half of them), with vectors for the others.

    `form`: "three", with a vector for the inputs of gate, up and down (the authors' code), or "one", for that of gate and up (the
    paper). Without training it is the model that takes the first `main` experts with the weights they have among k. Raises
    ValueError where k is 1, for another form, and for a `main` that is not between 1 and k-1.
    """
    family = Family.of(model.config)
    top_k = family.top_k
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not known; choose one of {', '.join(FORMS)}")
    main = main or top_k // 2
    if not 1 <= main < top_k:
        raise ValueError(f"main={main} must be at least 1 and fewer than the {top_k} experts that the router gives a token")
    config = model.config | {MAIN: main}
    rest = configured(model.rest, config=config)
    layers = {i: compressed_experts(rest.part(ESSENTIAL), model.layers[i], layer=i, form=form) for i in model.moe_layers}
    return replace(model, config=config, rest=rest).with_layers(layers)


def _compressed_experts_spec(rest: RestSpec, given: LayerSpec, *, layer: int, form: str) -> Spec:
    given.check_routing("take")
    if given.share < 1:
        raise ValueError(f"how many experts layer {layer} keeps is decided by a run; attach Compressed Experts to its result")
    family = Family.of(rest.config)
    if (reach := family.experts_per_token(given.experts)) <= family.main_experts:
        raise ValueError(
            f"a token gets {reach} of the {given.experts} experts of layer {layer}, which leaves none to stand for; drop fewer"
        )
    added = _added(rest.config, given.tensors, layer, form)
    out = replace(given, config=rest.config, tensors={**given.tensors, **added})
    return Spec(out, reads=given.headers, writes=file_bytes(added), memory=1 << 26)


@step("fewer_active.compressed_experts", version=1, spec=_compressed_experts_spec)
def compressed_experts(context: Context, config: Artifact, given: Artifact, *, layer: int, form: str) -> None:
    """One layer's files, and beside them its experts' vectors (`routing.safetensors`), as differences from one: zeros."""
    import torch

    from moeflow.model.checkpoint import DTYPES, save

    for name in given.names():
        context.link(given, name)
    added = _added(read_config(config), {n: (t.dtype, t.shape) for n, t in headers(given).items()}, layer, form)
    save({n: torch.zeros(shape, dtype=DTYPES[dtype]) for n, (dtype, shape) in added.items()}, context.out / ROUTING)


def _added(config: Config, tensors: TensorTable, layer: int, form: str) -> TensorTable:
    """The vectors of a layer: names, in the precision of its experts, and shapes."""
    family = Family.of(config)
    found = format_of({n: shape for n, (_, shape) in tensors.items()}, config, layer)
    name = family.expert(layer, 0)[0]
    held = next(n for n in (name, family.factors(name)[0]) if n in tensors or n + PACKED in tensors)
    dtype, shape = tensors.get(held) or tensors[held + PACKED]
    dtype = tensors[held + SCALE][0] if held not in tensors else "BF16" if dtype.startswith("F8") else dtype
    shapes = routing_shapes(family, Format(found.experts, compressed=form), layer, int(config["hidden_size"]), shape[0])
    return {n: (dtype, s) for n, s in shapes.items()}


def skip(calibration: Calibration, *, active: float = 0.0) -> Model:
    """The calibrated model with dynamic skipping in each of its MoE layers; no pass over the tokens is made for it.

    `active`: how many experts a token has on average in each layer, for which that layer's threshold is set; 0: the paper's rule
    for two experts a token, the median of the second weight over the first. Prune and decompose before: thresholds belong to the
    model that is served. Raises ValueError where the router gives one expert a token or weighs each by itself, for an `active` that
    is not between 1 and the router's number of experts, and for 0 where that is more than two.
    """
    model = calibration.model
    family = Family.of(model.config)
    top_k = family.top_k
    check(family, top_k, active)
    rule = "ratio" if top_k == 2 else "tail"
    skipping = {
        i: skipping(model.essential, model.layers[i], *parts, layer=i, rule=rule, active=active)
        for i, parts in calibration.observed.items()
    }
    return model.with_layers(skipping)


def check(family: Family, top_k: int, active: float) -> None:
    """Raise ValueError where a router of `top_k` experts a token cannot have `active` on average by skipping."""
    if family.arch.score == "sparsemixer":
        raise ValueError(
            f"a {family.arch.model_type} weighs each of a token's experts by itself, nearly always by one, so that its weights do "
            "not say which can be skipped; attach Compressed Experts instead"
        )
    if top_k < 2:
        raise ValueError("the router gives each token one expert; none is left to skip")
    if active == 0 and top_k > 2:
        raise ValueError(
            f"the router gives each token {top_k} experts, for which there is no rule of a median; say how many stay (1 to {top_k})"
        )
    if active and not 1 <= active < top_k:
        raise ValueError(f"active={active:g} experts a token must be at least 1 and fewer than the router's {top_k}")


def _skipping_spec(rest: RestSpec, given: LayerSpec, *seen: ObservedSpec, layer: int, rule: str, active: float) -> Spec:
    given.check_routing("take")
    if Family.of(rest.config).experts_per_token(given.least) < 2:
        raise ValueError(f"a token may get one expert of layer {layer} only, and none to skip; drop fewer experts")
    tokens = sum(s.hidden.sequences * s.hidden.length for s in seen)
    name = f"{Family.of(rest.config).experts(layer)}skip.{rule}"
    out = replace(given, config=rest.config, tensors={**given.tensors, name: ("F32", ())})
    logits = tokens * given.experts * 4
    return Spec(out, reads=logits, writes=file_bytes({name: ("F32", ())}) + 300, memory=6 * logits + (1 << 28))


@step("fewer_active.skipping", version=1, spec=_skipping_spec)
def skipping(context: Context, config: Artifact, given: Artifact, *seen: Artifact, layer: int, rule: str, active: float) -> None:
    """One layer's files, and beside them its threshold (`routing.safetensors`), with what it rests on in `skip.json`.

    `seen`: what each shard of tokens showed in this layer; `active` as in `skip`.
    """
    from moeflow.methods.fewer_active.thresholds import threshold
    from moeflow.model.checkpoint import save

    for name in given.names():
        context.link(given, name)
    read = read_config(config)
    value, about = threshold(read, given, seen, layer=layer, rule=rule, active=active)
    save({f"{Family.of(read).experts(layer)}skip.{rule}": value}, context.out / ROUTING)
    (context.out / SKIP).write_text(json.dumps({"layer": layer, "rule": rule, **about}) + "\n")
