"""The tensors of a checkpoint against those that its config.json asks for. No torch."""

from collections.abc import Mapping

from moeflow.arch import EMBEDDING, HEAD, LAYERS, Config, Family, layer_of
from moeflow.model.formats import Format, format_of, routing_shapes, some
from moeflow.model.packed import Shapes, unpacked_shapes
from moeflow.model.spec import TensorTable, shapes_of

Shape = tuple[int | None, ...]
"""None: any size, where config.json leaves it to the defaults of transformers."""


def check_layer(config: Config, layer: int, table: TensorTable, known: Shapes | None = None) -> None:
    """Raise ValueError if a decoder layer does not have exactly the tensors that config.json asks for.

    `known`: those of the whole model but its routed experts, as looking at it told them (`Found.shapes`); None: nothing is asked
    beside the routed experts.
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
    stored, experts = unpacked_shapes(shapes, config), _experts(family, format, layer)
    if known is None:
        _compare(f"layer {layer}", experts, {n: s for n, s in stored.items() if n.startswith(family.experts(layer))})
    else:
        _compare(f"layer {layer}", _beside(family, format, layer, known) | experts, stored)


def check_rest(config: Config, table: TensorTable, known: Shapes | None = None) -> None:
    """Raise ValueError if embedding, final norm and head are not exactly the tensors that config.json asks for.

    `known`: as for `check_layer`.
    """
    if known is None:
        return
    asked: dict[str, Shape] = {n: tuple(shape) for n, shape in known.items() if layer_of(n) is None}
    if HEAD not in asked and HEAD in table and EMBEDDING in asked:  # tied to the embedding, and stored all the same
        asked[HEAD] = asked[EMBEDDING]
    elif HEAD in asked and HEAD not in table and EMBEDDING in table:
        raise ValueError(f"the checkpoint has no tensor {HEAD}; it is incomplete, or tie_word_embeddings is wrong")
    _compare("the checkpoint", asked, unpacked_shapes(shapes_of(table), config))


def _beside(family: Family, format: Format, layer: int, known: Shapes) -> dict[str, Shape]:
    """The names and shapes of what a decoder layer of this format has beside its routed experts."""
    made = {n: tuple(shape) for n, shape in known.items() if n.startswith(family.prefix(layer))}
    router = family.router_tensors(layer)
    for name in (n for n in router if n in made):
        made[name] = (format.experts, *made[name][1:]) if name == router[0] else (*made[name][:-1], format.experts)
    gone = {*router} if format.gone else set()
    if format.gone == "moe":
        gone |= {n for n in made if n in (*family.shared(layer), family.shared_gate(layer))}
        gone |= {n for n in made if n.startswith(family.norm(layer)) and not family.arch.norm_feeds_more}
    return {n: shape for n, shape in made.items() if n not in gone}


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


def _compare(what: str, asked: Mapping[str, Shape], stored: Mapping[str, Shape]) -> None:
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
