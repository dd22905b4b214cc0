"""Fewer active experts per token: dynamic skipping and Compressed Experts.

NAEE (Lu et al., ACL 2024, arXiv 2402.14800), section 3.3 and appendix A.2, and Compressed Experts (He et al., EMNLP Findings 2025,
arXiv 2503.00634). Thresholds follow from what a calibration recorded; vectors start at one, which changes nothing, and are trained.
"""

from dataclasses import dataclass, replace
from typing import Literal

from moeflow.arch import MAIN, Config, Family
from moeflow.methods.graph import Calibration, Model
from moeflow.methods.records import Facts
from moeflow.methods.rewrite import configured, link_all
from moeflow.model.formats import Format, format_of, routing_shapes
from moeflow.model.layout import ESSENTIAL, ROUTING, headers, read_config
from moeflow.model.packed import BLOCKS, PACKED, SCALE
from moeflow.model.spec import LayerSpec, ObservedSpec, RestSpec, TensorTable, file_bytes
from moeflow.options import check_choices
from moeflow.step import Artifact, Context, Spec, step


@dataclass(frozen=True)
class Skipping:
    """Dynamic skipping: a token skips those of its experts whose routing weight is small relative to its largest."""

    active: float | Literal["median"] = "median"
    """The mean number of experts per token in each layer; median: the paper's rule for two experts a token."""

    def __post_init__(self) -> None:
        if self.active != "median" and self.active < 1:
            raise ValueError(f"active={self.active:g}: a token has at least one expert")


@dataclass(frozen=True)
class CompressedExperts:
    """Compressed Experts: some of a token's experts compute it, and vectors stand in for the others."""

    main: int | None = None
    """How many experts compute a token; none: half of those that the router chooses."""
    form: Literal["three", "one"] = "three"
    """Vectors per expert: three, for the inputs of gate, up and down (the authors' code), or one for gate and up (the paper)."""

    def __post_init__(self) -> None:
        check_choices(self)


def attach(model: Model, how: CompressedExperts = CompressedExperts()) -> Model:
    """Build the graph of the model with Compressed Experts in every MoE layer.

    Before training, its output is that of the model with only each token's first `how.main` experts, at the weights that they have
    among all k. Raises ValueError if k is 1, and if `how.main` is not between 1 and k-1.
    """
    family = Family.of(model.config)
    family.check_weighs_outputs("Compressed Experts")
    top_k = family.top_k
    main = top_k // 2 if how.main is None else how.main
    if not 1 <= main < top_k:
        raise ValueError(f"main={main} must be at least 1 and fewer than the {top_k} experts that the router gives a token")
    config = model.config | {MAIN: main}
    rest = configured(model.rest, config=config)
    layers = {i: compressed_experts(rest.part(ESSENTIAL), model.layers[i], layer=i, form=how.form) for i in model.moe_layers}
    return replace(model, config=config, rest=rest).with_layers(layers)


def _compressed_experts_spec(rest: RestSpec, before: LayerSpec, *, layer: int, form: str) -> Spec:
    before.check_routing("take")
    if before.share < 1:
        raise ValueError(f"how many experts layer {layer} keeps is decided by a run; attach Compressed Experts to its result")
    family = Family.of(rest.config)
    if (most := family.experts_per_token(before.experts)) <= family.main_experts:
        raise ValueError(
            f"a token gets {most} of the {before.experts} experts of layer {layer}, which leaves none to stand for; drop fewer"
        )
    added = _added(rest.config, before.tensors, layer, form)
    out = replace(before, config=rest.config, tensors={**before.tensors, **added})
    return Spec(out, reads=before.headers, writes=file_bytes(added), memory=1 << 26)


@step("fewer_active.compressed_experts", version=1, spec=_compressed_experts_spec)
def compressed_experts(
    context: Context, config: Artifact, layer_files: Artifact, *, layer: int, form: Literal["three", "one"]
) -> None:
    """One layer's files, plus its experts' vectors in `routing.safetensors`, stored as differences from one: zeros."""
    import torch

    from moeflow.model.checkpoint import DTYPES, save

    link_all(context, layer_files, but=(Facts.FILE,))
    values = read_config(config)
    added = _added(values, {n: (t.dtype, t.shape) for n, t in headers(layer_files).items()}, layer, form)
    save({n: torch.zeros(shape, dtype=DTYPES[dtype]) for n, (dtype, shape) in added.items()}, context.out / ROUTING)
    Facts.of(layer_files).and_then("fewer_active.compressed_experts", form=form, main=values[MAIN]).write(context.out)


def _added(config: Config, tensors: TensorTable, layer: int, form: str) -> TensorTable:
    """The names, shapes and dtype (that of its experts) of a layer's vectors."""
    family = Family.of(config)
    experts = format_of({n: shape for n, (_, shape) in tensors.items()}, config, layer).experts
    name = family.expert(layer, 0)[0]
    gate = next(n for n in (name, family.factors(name)[0]) if any(n + end in tensors for end in ("", PACKED, BLOCKS)))
    if gate + PACKED in tensors:
        dtype, shape = tensors[gate + SCALE][0], tensors[gate + PACKED][1]
    else:
        dtype, shape = tensors.get(gate) or tensors[gate + BLOCKS]
    dtype = "BF16" if dtype.startswith(("F8", "U8")) else dtype
    shapes = routing_shapes(family, Format(experts, compressed=form), layer, int(config["hidden_size"]), shape[0])
    return {n: (dtype, s) for n, s in shapes.items()}


def skip(calibration: Calibration, how: Skipping = Skipping()) -> Model:
    """Build the graph of the calibrated model with dynamic skipping in each MoE layer, without another pass over tokens.

    Prune and decompose first: thresholds belong to the model that is served. Raises ValueError if the router gives a token one
    expert or weighs each by itself, if `how.active` is not below the router's number of experts per token, and if it is "median"
    and that number is more than two.
    """
    model = calibration.model
    check(Family.of(model.config), how)
    layers = {i: skipping(model.essential, model.layers[i], parts, layer=i, how=how) for i, parts in calibration.observed.items()}
    return model.with_layers(layers)


def check(family: Family, how: Skipping) -> None:
    """Raise ValueError if experts cannot be skipped like this with the family's router."""
    top_k = family.top_k
    family.check_weighs_outputs("skipped experts")
    if family.arch.score == "sparsemixer":
        raise ValueError(
            f"a {family.arch.model_type} weighs each of a token's experts by itself, nearly always by one, so that its weights do "
            "not say which can be skipped; attach Compressed Experts instead"
        )
    if top_k < 2:
        raise ValueError("the router gives each token one expert; none is left to skip")
    if how.active == "median" and top_k > 2:
        raise ValueError(
            f"the router gives each token {top_k} experts, for which there is no rule of a median; say how many stay (1 to {top_k})"
        )
    if how.active != "median" and how.active >= top_k:
        raise ValueError(f"active={how.active:g} experts a token must be at least 1 and fewer than the router's {top_k}")


def _rule(family: Family) -> str:
    """How the weights of a token's experts are compared: the paper's rule for two experts a token, ours for more."""
    return "ratio" if family.top_k == 2 else "tail"


def _skipping_spec(rest: RestSpec, before: LayerSpec, observed: tuple[ObservedSpec, ...], *, layer: int, how: Skipping) -> Spec:
    before.check_routing("take")
    family = Family.of(rest.config)
    if family.experts_per_token(before.least) < 2:
        raise ValueError(f"a token may get one expert of layer {layer} only, and none to skip; drop fewer experts")
    tokens = sum(o.hidden.sequences * o.hidden.length for o in observed)
    name = f"{family.experts(layer)}skip.{_rule(family)}"
    out = replace(before, config=rest.config, tensors={**before.tensors, name: ("F32", ())})
    logits = tokens * before.experts * 4
    return Spec(out, reads=logits, writes=file_bytes({name: ("F32", ())}) + 300, memory=6 * logits + (1 << 28))


@step("fewer_active.skipping", version=1, spec=_skipping_spec)
def skipping(
    context: Context, config: Artifact, layer_files: Artifact, observed: tuple[Artifact, ...], *, layer: int, how: Skipping
) -> None:
    """One layer's files, plus its threshold in `routing.safetensors`. `observed`: what each shard recorded in it."""
    from moeflow.methods.fewer_active.thresholds import threshold
    from moeflow.model.checkpoint import save

    link_all(context, layer_files, but=(Facts.FILE,))
    family = Family.of(read_config(config))
    rule = _rule(family)
    value, about = threshold(family, layer_files, observed, layer=layer, rule=rule, active=how.active)
    save({f"{family.experts(layer)}skip.{rule}": value}, context.out / ROUTING)
    Facts.of(layer_files).and_then("fewer_active.skipping", rule=rule, **about).write(context.out)
