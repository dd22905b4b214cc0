"""The tensors of a checkpoint against those that its config.json asks for. No torch."""

from collections.abc import Mapping

from moeflow.arch import EMBEDDING, HEAD, LAYERS, Config, Family, layer_of
from moeflow.arch.shapes import Shape, attention_shapes, mlp_shapes, norm_shapes, rest_shapes, shared_shapes
from moeflow.model.formats import Format, format_of, routing_shapes, some
from moeflow.model.packed import Shapes, logical, packed_shapes
from moeflow.model.spec import TensorTable, shapes_of


def check_layer(config: Config, layer: int, table: TensorTable, known: Shapes | None = None) -> None:
    """Raise ValueError if a decoder layer does not have exactly the tensors that config.json asks for.

    `known`: those of the whole model but its routed experts, where looking at the family has told them; None: they follow from
    `Arch`. Of a family that was only looked at, if they are not known, nothing is asked.
    """
    family, shapes = Family.of(config), shapes_of(table)
    format = format_of(shapes, config, layer)
    if LAYERS in config:
        wanted = Format.from_json({"experts": 0} | (config[LAYERS][layer] or {}))
    else:
        wanted = Format(family.num_experts if layer in family.moe_layers else 0)
    if format != wanted:
        raise ValueError(
            f"config.json says that layer {layer} has {wanted.words()}, its tensors say {format.words()}; correct one of them"
        )
    if known is not None:
        beside = {n: tuple(shape) for n, shape in known.items() if n.startswith(family.prefix(layer))}
        _compare(f"layer {layer}", beside | _experts(family, format, layer), shapes, config)
    elif not family.arch.looked_at:
        _compare(f"layer {layer}", _asked(family, format, layer), shapes, config)


def check_rest(config: Config, table: TensorTable, known: Shapes | None = None) -> None:
    """Raise ValueError if embedding, final norm and head are not exactly the tensors that config.json asks for.

    `known`: as for `check_layer`.
    """
    family = Family.of(config)
    if known is None and family.arch.looked_at:
        return
    asked: dict[str, Shape] = dict(rest_shapes(family))
    tied = bool(config.get("tie_word_embeddings"))
    if known is not None:
        asked = {n: tuple(shape) for n, shape in known.items() if layer_of(n) is None}
        tied = HEAD not in asked
    if tied and HEAD not in table:
        asked.pop(HEAD, None)
    elif tied and EMBEDDING in asked:  # stored all the same
        asked[HEAD] = asked[EMBEDDING]
    elif HEAD not in table and EMBEDDING in table:
        raise ValueError(f"the checkpoint has no tensor {HEAD}; it is incomplete, or tie_word_embeddings is wrong")
    _compare("the checkpoint", asked, shapes_of(table), config)


def _asked(family: Family, format: Format, layer: int) -> dict[str, Shape]:
    """The names and shapes of a decoder layer of this format."""
    width = family.size("hidden_size") or 0
    shapes = norm_shapes(family, f"{family.prefix(layer)}input_layernorm.") | attention_shapes(family, layer)
    if format.gone != "moe":
        shapes |= norm_shapes(family, family.norm(layer))
    if layer not in family.moe_layers:
        dense = tuple(f"{family.prefix(layer)}{family.arch.block}.{matrix}_proj.weight" for matrix in ("gate", "up", "down"))
        return shapes | mlp_shapes(family, dense, family.size("intermediate_size"))
    if format.gone != "moe":
        shapes |= shared_shapes(family, layer)
    if not format.experts:
        return shapes
    shapes |= {name: (format.experts, width) for name in (family.router(layer),)}
    if (bias := family.router_bias(layer)) is not None:
        shapes[bias] = (format.experts,)
    return shapes | _experts(family, format, layer)


def _experts(family: Family, format: Format, layer: int) -> dict[str, Shape]:
    """The names and shapes of a layer's routed experts, and of what is stored beside them."""
    width, inner = family.size("hidden_size"), family.expert_size
    sides = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    shapes: dict[str, Shape] = {}
    for expert in range(format.experts):
        for matrix, name in zip(family.matrices, family.expert(layer, expert), strict=True):
            rank, (m, n) = format.ranks(matrix)[expert], sides[matrix]
            out, within = family.factors(name)
            shapes |= {out: (m, rank), within: (rank, n)} if rank else {name: (m, n)}
        for matrix, template in zip(family.matrices, family.arch.expert_biases, strict=False):
            shapes[template.format(layer=layer, expert=expert)] = sides[matrix][:1]
    return shapes | dict(routing_shapes(family, format, layer, width or 0, inner or 0))


def _compare(what: str, asked: Mapping[str, Shape], shapes: Shapes, config: Config) -> None:
    unpacked = packed_shapes(shapes, config)
    stored = {name: tuple(unpacked.get(name, shapes.get(name, ()))) for name in logical(shapes)}
    if missing := sorted(set(asked) - set(stored)):
        raise ValueError(
            f"{what} has no tensor {some(missing)}, which config.json asks for; it is incomplete, or of another family"
        )
    if extra := sorted(set(stored) - set(asked)):
        raise ValueError(f"{what} has {some(extra)}, which config.json leaves no place for; correct one of them")
    for name, shape in asked.items():
        fits = len(shape) == len(stored[name]) and all(a in (None, b) for a, b in zip(shape, stored[name], strict=True))
        if not fits:
            sizes = str(shape).replace("None", "any")
            raise ValueError(f"{name} has shape {stored[name]} where config.json asks for {sizes}; correct one of them")
