"""Where the tensors of experts on disk lie in the stacks in memory. Shapes are suffixes: E experts, M rows, N columns."""

from typing import Any

from torch import Tensor

from moeflow.arch import Family
from moeflow.model.factors import form_of, stacks
from moeflow.model.formats import Format, routing_shapes, some
from moeflow.model.packed import ADDED_IN, ADDED_OUT, PACKED, SCALE, SHAPE, ZERO, unpack

PARTS = (PACKED, SCALE, SHAPE)


class Pieces:
    """The places of all experts of a model's layers; a tensor that another rank has is taken and dropped."""

    def __init__(self, family: Family, *, zeros: bool = False) -> None:
        """`zeros`: whether packed matrices have zero points."""
        self.family, self.parts = family, (*PARTS, *([ZERO] if zeros else []))
        self.places: dict[str, Tensor | None] = {}
        self.added: set[str] = set()
        self.packed: dict[str, dict[str, Tensor]] = {}
        self.missing: set[str] = set()

    def add(self, layer: int, format: Format, experts: Any, share: range | None = None) -> None:
        """Add a layer's module of experts, whose stacks become zero. With a `share`, it has only these of them."""
        own, form = format if share is None else format.part(share), form_of(experts)
        for stack in stacks(format, form):
            names = [stack.on_disk(self.family, layer, m, e) for m in stack.matrices for e in stack.experts(format)]
            self.places |= dict.fromkeys(names)
            self.added |= set(names if format.added else ())
        first = share.start if share else 0
        for stack in stacks(own, form):
            parameter = getattr(experts, stack.name).data.zero_()
            for matrix, expert, place_MN in stack.pieces(parameter, own, form):
                self.places[stack.on_disk(self.family, layer, matrix, first + expert)] = place_MN
        beside = routing_shapes(self.family, format, layer, experts.hidden_dim, experts.intermediate_dim) if format.own else {}
        for name in beside:
            part, _, field = name.removeprefix(self.family.experts(layer)).partition(".")
            self.places[name] = getattr(getattr(experts, part), field).data.zero_()
        vectors = set(beside) if format.compressed else set()  # a checkpoint may be without them; zeros change nothing
        self.missing |= {n for n, place in self.places.items() if place is not None} - vectors

    def take(self, name: str, tensor: Tensor) -> bool:
        """Put the tensor with this name on disk into its place; False if it is of no expert. Raises ValueError for another size."""
        every = (*self.parts, ADDED_OUT, ADDED_IN)
        end = next((e for e in every if name.endswith(e) and name.removesuffix(e) in self.places), "")
        name = name.removesuffix(end)
        if name not in self.places:
            return False
        place = self.places[name]
        if place is None:
            return True
        if end:
            parts = self.packed.setdefault(name, {})
            parts[end] = tensor.clone()  # vLLM may read the next one into the same memory
            if len(parts) < len(every if name in self.added else self.parts):
                return True
            tensor = unpack(parts)
            del self.packed[name]
        if tensor.shape != place.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} where config.json asks for {tuple(place.shape)}; correct one")
        place.copy_(tensor)
        self.missing.discard(name)
        return True

    def check_whole(self, where: str) -> None:
        """Raise ValueError if a place has not been filled."""
        if self.missing:
            raise ValueError(
                f"{where} has no tensor {some(sorted(self.missing))}, which its config.json asks for; the checkpoint is incomplete"
            )
