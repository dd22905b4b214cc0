"""The names on disk of a tiny model's tensors, found by saving it and looking for each tensor's values in the files.

Nothing is assumed of how transformers converts names and stacks: what is found is what was written.
Shapes are suffixes: E experts, F expert width, D model width.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from moeflow.arch import Layout, Stacked
from moeflow.model.structure.anatomy import Anatomy, Unknown, is_turned

LAYER, EMBED, NORM, OUT = "model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."
"""The beginnings of names that moeflow works on."""

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Names:
    """The names that a checkpoint has: the layout, and what is inside a layer, on disk and in memory."""

    layout: Layout
    stack: str  # the beginning of the names of all layers on disk
    memory: Pairs  # (on disk, in memory): beginnings of names inside a layer that differ
    experts: tuple[str, ...]  # inside a layer, over {expert}: the matrices of `MATRICES`, without a gate if there is none
    biases: tuple[str, ...]
    rest: Pairs  # (ours, in memory): beginnings of names outside the layers that differ

    def inside(self, memory: str) -> str:
        """The name on disk of a tensor inside a layer that is called so in memory."""
        return _first(self.memory, memory, 1)


def saved(model: Any, *, original: bool) -> dict[str, Tensor]:
    """The tensors of the files that transformers writes of a model: as the hub has them (`original`), or as it holds them."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_original_format=original)
        return {n: t for file in sorted(Path(folder).glob("*.safetensors")) for n, t in load_file(file).items()}


def scrambled(model: Any, vectors: Iterable[str]) -> None:
    """Give every tensor of a model values of its own, so that each can be told from all others and routers really choose."""
    random = torch.Generator().manual_seed(11)
    small = tuple(vectors)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=random)
            if tensor.dim() > 1 and not name.endswith(small):
                tensor.copy_(noise * 0.2)
            else:
                tensor.copy_(tensor.float().nan_to_num() * 0.5 + noise * 0.1)


def named(model: Any, anatomy: Anatomy, disk: Mapping[str, Tensor]) -> Names:
    """Where each tensor of a model lies in these files. Raises Unknown for one that lies nowhere as it is."""
    found = _Found(disk)
    state = model.state_dict()
    inner: dict[str, str] = {}
    stacks: set[str] = set()
    for name, tensor in state.items():
        if name.startswith(f"{anatomy.stack}.") and f".{anatomy.block}.experts." not in name:
            number, _, inside = name.removeprefix(f"{anatomy.stack}.").partition(".")
            before, number_there, there = split(found.whole(name, tensor), number)
            stacks.add(before)
            if inner.setdefault(inside, there) != there:
                raise Unknown(f"{inside} is called {there} in layer {number_there} and {inner[inside]} in another")
    if len(stacks) != 1:
        raise Unknown(f"layers lie below {' and '.join(sorted(stacks))} on disk")
    stack = stacks.pop()
    experts, biases, stacked = _experts(model, anatomy, found, stack)
    renamed, rest = _outside(state, anatomy, found, stack)
    return Names(Layout(renamed=renamed, stacked=stacked), stack, _pairs(inner), experts, biases, rest)


class _Found:
    """Tensors by their values."""

    def __init__(self, disk: Mapping[str, Tensor]) -> None:
        self.disk = disk
        self._by_value = {self._key(t): n for n, t in disk.items()}

    def whole(self, name: str, tensor: Tensor) -> str:
        if (there := self._by_value.get(self._key(tensor))) is None:
            raise Unknown(f"{name} is not on disk as it is in memory; it is converted in a way that is not known")
        return there

    def same(self, tensor: Tensor) -> str | None:
        return self._by_value.get(self._key(tensor))

    def holding(self, pieces: list[Tensor]) -> str | None:
        """The stack of these pieces, one of each expert."""
        return self.same(torch.stack(pieces))

    @staticmethod
    def _key(tensor: Tensor) -> tuple[Any, ...]:
        return tuple(tensor.shape), tensor.float().contiguous().numpy().tobytes()


def split(name: str, number: str) -> tuple[str, str, str]:
    """A name on disk as what is before the layer's number, that number, and what is behind it."""
    match = re.match(rf"(.*?\.|){number}\.(.+)", name)
    if match is None:
        raise Unknown(f"{name} on disk belongs to layer {number} and does not say so")
    return match[1], number, match[2]


def _experts(
    model: Any, anatomy: Anatomy, found: _Found, stack: str
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Stacked, ...]]:
    number = str(anatomy.moe[-1])
    module = anatomy.layer(model, int(number)).get_submodule(f"{anatomy.block}.experts")
    matrices, biases = unstacked(module)
    each = {m: found.same(pieces[1]) for m, pieces in matrices.items()}
    if all(each.values()):
        names = tuple(_template(split(str(each[m]), number)[2]) for m in matrices)
        held = {m: found.same(pieces[1]) for m, pieces in biases.items()}
        if not all(held.values()):
            raise Unknown("the experts' matrices lie alone on disk, and their biases do not")
        return names, tuple(_template(split(str(held[m]), number)[2]) for m in biases), ()
    layouts: list[Stacked] = []
    wholes: dict[str, str] = {}
    for ends, pieces in ((".weight", matrices), (".bias", biases)):
        for group in _groups(pieces, found):
            name, transposed, interleaved = _stacked(found, [pieces[m] for m in group], "and".join(group))
            inside = split(name, number)[2]
            stem = inside.partition(".experts.")[0] if ".experts." in inside else inside.rpartition(".")[0].rpartition(".")[0]
            parts = {m: f"{stem}.experts.{{expert}}.{m}_proj{ends}" for m in group}
            wholes |= {m + ends: part for m, part in parts.items()}
            layouts.append(
                Stacked(
                    name=f"{stack}{{layer}}.{inside}", parts=tuple(f"{LAYER}{{layer}}.{p}" for p in parts.values()),
                    transposed=transposed, interleaved=interleaved,
                )
            )  # fmt: skip
    names, held_in = (tuple(wholes[m + ends] for m in pieces) for ends, pieces in ((".weight", matrices), (".bias", biases)))
    return names, held_in, tuple(layouts)


def _turned(tensor: Tensor) -> Tensor:
    """A matrix on its side; a bias as it is."""
    return tensor.mT.contiguous() if tensor.ndim > 1 else tensor


def _groups(pieces: Mapping[str, list[Tensor]], found: _Found) -> list[tuple[str, ...]]:
    """The matrices that lie together on disk: of gate and up, if each has no stack of its own, those of both."""
    apart = all(found.holding(pieces[m]) or found.holding([_turned(t) for t in pieces[m]]) for m in pieces if m != "down")
    if apart or "gate" not in pieces:
        return [(m,) for m in pieces]
    return [("gate", "up"), ("down",)]


def _stacked(found: _Found, parts: list[list[Tensor]], what: str) -> tuple[str, bool, bool]:
    """The tensor on disk that holds these matrices of all experts: its name, whether transposed, whether interleaved."""
    for interleaved in (False, True)[: len(parts)]:
        joined = [_joined(each, interleaved) for each in zip(*parts, strict=True)]
        for transposed in (False, True)[: joined[0].dim()]:
            name = found.holding([_turned(t) if transposed else t for t in joined])
            if name is not None:
                return name, transposed, interleaved
    raise Unknown(f"the experts' {what} matrices are on disk neither alone nor in a stack of all experts")


def _joined(parts: tuple[Tensor, ...], interleaved: bool) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts, dim=1).flatten(0, 1) if interleaved else torch.cat(parts)


def unstacked(module: Any) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """The matrices [M, N] of each expert by name (`MATRICES`), and their biases, of transformers' fused experts."""
    stacks = dict(module.named_parameters(recurse=False))
    gated = "gate_up_proj" in stacks
    first = "gate_up_proj" if gated else "up_proj"
    turned = is_turned(module)
    joined = getattr(module, "is_concatenated", True)
    if other := set(stacks) - {first, "down_proj", f"{first}_bias", "down_proj_bias"}:
        raise Unknown(f"its experts have {', '.join(sorted(other))} beside their matrices")

    def pieces(name: str) -> list[Tensor]:
        stack = stacks[name].detach()
        return list(stack.transpose(1, 2) if turned and stack.dim() == 3 else stack)

    def both(name: str) -> dict[str, list[Tensor]]:
        if not gated:
            return {"up": pieces(name)}
        halves = [(t[::2], t[1::2]) if not joined else tuple(t.chunk(2)) for t in pieces(name)]
        return {"gate": [g for g, _ in halves], "up": [u for _, u in halves]}

    matrices = both(first) | {"down": pieces("down_proj")}
    has_biases = f"{first}_bias" in stacks
    biases = both(f"{first}_bias") | {"down": pieces("down_proj_bias")} if has_biases else {}
    return matrices, biases


def _template(inside: str) -> str:
    """The name of expert 1's tensor inside a layer as a template."""
    parts = inside.split(".")
    at = [i for i, part in enumerate(parts) if part == "1"]
    if len(at) != 1:
        raise Unknown(f"{inside} on disk belongs to expert 1 and does not say so once")
    parts[at[0]] = "{expert}"
    return ".".join(parts)


def ours_of(name: str, anatomy: Anatomy, names: Names) -> str | None:
    """Our name of a tensor in memory; None for a stack of experts, and for what is no part of the text model."""
    if f".{anatomy.block}.experts." in name:
        return None
    if name.startswith(f"{anatomy.stack}."):
        number, _, inside = name.removeprefix(f"{anatomy.stack}.").partition(".")
        return f"{LAYER}{number}.{names.inside(inside)}"
    places = {anatomy.embedding: EMBED, anatomy.final_norm: NORM, anatomy.head: OUT}
    module, _, last = name.rpartition(".")
    return f"{places[module]}{last}" if module in places else None


def _pairs(inner: Mapping[str, str]) -> Pairs:
    """The beginnings (on disk, in memory) that differ, longest first, so that the first that fits is right for every name."""
    different = {here: there for here, there in inner.items() if here != there}
    short = {shortened(there, here) for here, there in different.items()}
    for pairs in (short, {(there, here) for here, there in different.items()}):
        ordered = tuple(sorted(pairs, key=lambda p: (-len(p[1]), p)))
        if all(_first(ordered, here, 1) == there and _first(ordered, there, 0) == here for here, there in inner.items()):
            return ordered
    raise Unknown("names inside a layer differ on disk, and no rule over their beginnings says how")


def shortened(disk: str, memory: str) -> tuple[str, str]:
    """The two names without the parts that both end with; at least one part of each is left."""
    there, here = disk.split("."), memory.split(".")
    ends = ""
    while len(there) > 1 and len(here) > 1 and there[-1] == here[-1]:
        there.pop()
        here.pop()
        ends = "."
    return ".".join(there) + ends, ".".join(here) + ends


def _first(pairs: Pairs, name: str, side: int) -> str:
    """The other side's name by the first pair whose beginning on this side fits."""
    return next((p[1 - side] + name.removeprefix(p[side]) for p in pairs if name.startswith(p[side])), name)


def _outside(state: Mapping[str, Tensor], anatomy: Anatomy, found: _Found, stack: str) -> tuple[Pairs, Pairs]:
    """What is renamed outside the layers: (on disk, ours), and (ours, in memory)."""
    body = anatomy.stack.rpartition(".")[0]
    places = {anatomy.embedding: EMBED, anatomy.final_norm: NORM, anatomy.head: OUT}
    renamed, rest = {stack: LAYER}, {LAYER: f"{anatomy.stack}."}
    for name, tensor in state.items():
        if name.startswith(f"{anatomy.stack}."):
            continue
        module = name.rpartition(".")[0]
        if module not in places:
            if name.startswith(f"{body}.") or "." not in name:
                raise Unknown(f"outside its layers it has {name}, which is neither embedding, norm nor head")
            continue  # of another part of a multimodal model
        ours = places[module]
        rest[ours] = f"{module}."
        there = found.same(tensor)
        if there is None and module == anatomy.head:
            continue  # tied to the embedding
        if there is None:
            raise Unknown(f"{name} is not on disk as it is in memory")
        if module == anatomy.head and there.rpartition(".")[0] == renamed_back(renamed, EMBED):
            continue
        renamed[there.rpartition(".")[0] + "."] = ours
    return (
        tuple((a, b) for a, b in sorted(renamed.items(), key=lambda p: -len(p[0])) if a != b),
        tuple((a, b) for a, b in rest.items() if a != b),
    )


def renamed_back(renamed: Mapping[str, str], ours: str) -> str:
    return next((disk.rstrip(".") for disk, here in renamed.items() if here == ours), "")
