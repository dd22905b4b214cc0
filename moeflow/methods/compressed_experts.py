"""Compressed Experts: of a token's experts only the main ones are computed, and vectors stand for the others.

He et al., EMNLP Findings 2025, arXiv 2503.00634. They begin as vectors that change nothing, and are trained with the model or alone
(`finetune.tune`).
"""

from dataclasses import replace

from moeflow.arch import MAIN, Config, arch_of
from moeflow.methods.fetch import Model, configured
from moeflow.model.formats import FORMS, Format, format_of, routing_shapes
from moeflow.model.layout import ESSENTIAL, ROUTING, headers, read_config
from moeflow.model.packed import PACKED, SCALE
from moeflow.model.spec import LayerSpec, RestSpec, TensorTable, file_bytes
from moeflow.step import Artifact, Context, Spec, step


def attach(model: Model, *, main: int = 0, form: str = "three") -> Model:
    """The model in which a token is computed by `main` of its k experts (0: half of them), with vectors for the others.

    `form`: "three", with a vector for the inputs of gate, up and down (the authors' code), or "one", for that of gate and up (the
    paper). Without training it is the model that takes the first `main` experts with the weights they have among k. Raises
    ValueError where k is 1, for another form, and for a `main` that is not between 1 and k-1.
    """
    arch = arch_of(model.config)
    top_k = arch.top_k(model.config)
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not known; choose one of {', '.join(FORMS)}")
    main = main or top_k // 2
    if not 1 <= main < top_k:
        raise ValueError(f"main={main} must be at least 1 and fewer than the {top_k} experts that the router gives a token")
    config = model.config | {MAIN: main}
    rest = configured(model.rest, config=config)
    layers = {i: layer(rest.part(ESSENTIAL), model.layers[i], layer=i, form=form) for i in model.moe_layers}
    return replace(model, config=config, rest=rest).with_layers(layers)


def _layer_spec(rest: RestSpec, given: LayerSpec, *, layer: int, form: str) -> Spec:
    given.check_routing("take")
    if given.share < 1:
        raise ValueError(f"how many experts layer {layer} keeps is decided by a run; attach Compressed Experts to its result")
    arch = arch_of(rest.config)
    if (reach := arch.reach(rest.config, given.experts)) <= arch.computed(rest.config):
        raise ValueError(
            f"a token gets {reach} of the {given.experts} experts of layer {layer}, which leaves none to stand for; drop fewer"
        )
    added = _added(rest.config, given.tensors, layer, form)
    out = LayerSpec(rest.config, layer, given.experts, {**given.tensors, **added}, slimmed=given.slimmed)
    return Spec(out, reads=given.headers, writes=file_bytes(added), memory=1 << 26)


@step("compressed_experts.layer", version=1, spec=_layer_spec)
def layer(context: Context, config: Artifact, given: Artifact, *, layer: int, form: str) -> None:
    """One layer's files, and beside them its experts' vectors (`routing.safetensors`), as differences from one: zeros."""
    import torch

    from moeflow.model.checkpoint import DTYPES, save

    for name in given.names():
        context.link(given, name)
    added = _added(read_config(config), {n: (t.dtype, t.shape) for n, t in headers(given).items()}, layer, form)
    save({n: torch.zeros(shape, dtype=DTYPES[dtype]) for n, (dtype, shape) in added.items()}, context.out / ROUTING)


def _added(config: Config, tensors: TensorTable, layer: int, form: str) -> TensorTable:
    """The vectors of a layer: names, in the precision of its experts, and shapes."""
    arch = arch_of(config)
    found = format_of({n: shape for n, (_, shape) in tensors.items()}, config, layer)
    name = arch.gate.format(layer=layer, expert=0)
    held = next(n for n in (name, arch.factors(name)[0]) if n in tensors or n + PACKED in tensors)
    dtype, shape = tensors.get(held) or tensors[held + PACKED]
    dtype = tensors[held + SCALE][0] if held not in tensors else "BF16" if dtype.startswith("F8") else dtype
    shapes = routing_shapes(arch, Format(found.experts, compressed=form), layer, int(config["hidden_size"]), shape[0])
    return {n: (dtype, s) for n, s in shapes.items()}
