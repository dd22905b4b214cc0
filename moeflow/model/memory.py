"""What steps that compute with a model take of a GPU, from shapes alone. No torch."""

from collections.abc import Mapping, Sequence
from math import prod

from moeflow.arch import Config, Family
from moeflow.model.packed import Shapes, unpacked_shapes
from moeflow.model.spec import LayerSpec, element_bytes, shapes_of

CONTEXT = 1 << 30
"""Bytes of a GPU that its driver and libraries take before the first tensor."""
AHEAD = 8 << 30
"""Bytes of the next layer, at most, that are on a GPU of 80 GB while one computes: `moved.PART` of it. On a smaller one there are
fewer, on a larger one there is room."""
MARGIN = 1.1
"""What fragments of freed memory take, as a part of what the tensors do."""


def on_device(tensors: int) -> int:
    """The bytes of a GPU that a process with this many bytes of tensors takes at its peak."""
    return CONTEXT + int(MARGIN * tensors)


def passing(
    layers: Sequence[LayerSpec], tokens: int, dtype: str, *, handed_on: int = 0, copies: int = 1, recorded: bool = False
) -> int:
    """The bytes of tensors while a batch of `tokens` runs through one of these layers after the other, the largest alone.

    `handed_on`: the numbers of 4 bytes that a layer takes and gives for each token beside hidden states; `copies`: how often the
    layer's weights are there, and as often what of the next layer is moved ahead, or of the one that it was made of; `recorded`:
    every routed expert's output is kept until it is measured.
    """

    def of_token(layer: LayerSpec) -> int:
        size = element_bytes(layer.config, dtype)
        return run_per_token(layer.config, shapes_of(layer.tensors), size, recorded=recorded) + 2 * 4 * handed_on

    def there(layer: LayerSpec) -> int:
        return copies * (layer.loaded(dtype) + (min(layer.loaded(dtype), AHEAD) if len(layers) > 1 else 0))

    return max(there(layer) + tokens * of_token(layer) for layer in layers)


def run_per_token(config: Config, shapes: Shapes, size: int, *, recorded: bool = False) -> int:
    """The bytes of activations per token while a decoder layer with these tensors runs, in elements of `size` bytes."""
    family, width = Family.of(config), int(config["hidden_size"])
    made = bytes_per_token(config, unpacked_shapes(shapes, config), size)
    if recorded and any(family.kind(name) == "experts" for name in shapes):
        made += family.top_k * width * (2 * size + 4) + 8 * width  # inputs and outputs of pairs; norms in fp32
    return made


def together(room: int, of_one: int, at_most: int = 0) -> int:
    """How many sequences run together in `room` bytes where each takes `of_one`: at least one, and at most `at_most` if not 0."""
    fitting = max(1, room // max(1, of_one))
    return min(fitting, at_most) if at_most else fitting


def bytes_per_token(config: Config, shapes: Mapping[str, Sequence[int]], size: int) -> int:
    """The bytes of activations that a decoder layer with these tensors keeps per token for the backward pass.

    They are each matrix's input, and its output if that is transformed, for every computed expert; norms keep fp32. A forward
    pass alone never has more of them at once.
    """
    family, width = Family.of(config), int(config["hidden_size"])
    kinds: dict[str, list[tuple[int, ...]]] = {}
    stacks = 0
    for name, shape in shapes.items():
        kind = family.kind(name)
        if len(shape) == 2:
            kinds.setdefault(kind, []).append(tuple(shape))
        elif kind == "experts":
            stacks += prod(shape)
    elements = 2 * sum(m for m, _ in kinds.get("attention", ())) + 4 * width
    experts = kinds.get("experts", ())
    if experts or stacks:
        count = kinds["router"][0][0]
        inner = sum(m for m, _ in experts) // count  # rows of one expert's matrices: twice its width and the model's
        inner += stacks // (count * width) + width if stacks else 0  # which side is rows is not known: never fewer than there are
        elements += family.main_experts * (2 * inner + width) + 4 * count
    for kind in ("shared", "dense"):
        elements += 2 * sum(m for m, _ in kinds.get(kind, ())) + (width if kind in kinds else 0)
    return size * elements + 2 * 4 * width
