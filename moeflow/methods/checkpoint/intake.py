"""What lies in a checkpoint's files, as the tensors that moeflow works on: one for each matrix of each expert. No torch.

A stack of experts is read by the byte range of one expert. Where gate and up share that range, or lie on their side, it is read
once, and each is a view of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moeflow.arch import ARCH, HEAD, Config, Family, Layout, Stacked, layer_of, layout_in_memory
from moeflow.arch.by_layer import as_numbers
from moeflow.arch.found import Found
from moeflow.model.header import TensorInfo
from moeflow.model.json_file import kind_of
from moeflow.model.packed import BLOCKS, CODES, SCALES

if TYPE_CHECKING:
    from torch import Tensor

FROM_THE_WHOLE = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
"""The keys of a multimodal model's config.json that also say something of the text model inside it."""

PLACE = 5
"""The index of a `View` in an entry of `steps.Table`; an entry without one is as long."""

View = tuple[tuple[int, ...], bool, int, int]
"""How a matrix lies in a range of bytes: the shape [M, N] that the range has, whether it is turned to [N, M] first, the first of
its rows then, and from one row to the next."""


@dataclass(frozen=True)
class Piece(TensorInfo):
    """A tensor here, whose bytes [start, stop) of `file` also hold others, or hold it on its side."""

    view: View | None = None  # None: the bytes are the tensor


def text_config(whole: Config, found: Found | None, where: str) -> Config:
    """The configuration of the text model, config.json itself or what lies inside it, with the `Arch` that was found.

    Raises ValueError if it is not where the layout says.
    """
    if found is None:
        return whole
    text: Any = whole
    for at, key in enumerate(found.layout.inside):
        text = text.get(key)
        if not isinstance(text, dict):
            path = ".".join(found.layout.inside[: at + 1])
            raise ValueError(
                f"{where}: {path} is {kind_of(text)} where a {whole.get('model_type')} has its text model; half of it is missing, "
                "fetch the checkpoint again"
            )
    if found.layout.inside:
        above = {k: v for k in FROM_THE_WHOLE if (v := whole.get(k)) is not None}
        text = text | {"model_type": found.arch.model_type} | above
        if found.shapes is not None:  # the defaults of the two classes may differ, and the whole model's counts
            text["tie_word_embeddings"] = HEAD not in found.shapes
    return as_numbers(text) | {ARCH: found.arch.to_json()}


def layout_of(tensors: Mapping[str, TensorInfo], family: Family, found: Found | None, uri: str) -> Layout:
    """The layout of these tensors, as far as they use it. Raises ValueError for half a multimodal model, and as `pieces` does."""
    layout = found.layout if found is not None else layout_in_memory(family.arch, tensors)
    if layout.beside:
        outside = sum(n.startswith(layout.beside) for n in tensors)
        if not outside or outside == len(tensors):
            lacking = "no text model" if outside else f"nothing beside its text model ({', '.join(layout.beside[:3])})"
            raise ValueError(f"{uri} has {lacking}; it is half of a multimodal model, fetch the rest of it")
    used = layout.used(list(tensors))
    stacked = (_where_it_is(stack, tensors, used, family) for stack in used.stacked)
    return replace(used, stacked=tuple(_as_it_lies(stack, tensors, family, uri) for stack in stacked))


def pieces(tensors: Mapping[str, TensorInfo], layout: Layout, family: Family, uri: str) -> dict[str, TensorInfo]:
    """The tensors here of a checkpoint in this layout, without those beside the text model.

    Raises ValueError if a stack does not have a matrix of each expert, or two tensors would get one name.
    """
    made: dict[str, TensorInfo] = {}
    origin: dict[str, str] = {}
    for name, info in tensors.items():
        if layout.beside and name.startswith(layout.beside):
            continue
        if (found := layout.stack(name)) is not None:
            several = _unstacked(f"{name} at {uri} has shape {info.shape}", info, *found, family)
        else:
            here = layout.here(name)
            if (back := layout.on_disk(here)) != name:
                raise ValueError(f"{uri} has {name}, which would be written back as {back}; rename it, or leave it out")
            several = {here: info}
        if both := sorted(made.keys() & several.keys()):
            raise ValueError(f"{uri} has {both[0]} twice, in {origin[both[0]]} and in {name}; delete one of them")
        made |= several
        origin |= dict.fromkeys(several, name)
    return made


def wanted(layout: Layout, how: str, family: Family) -> Layout:
    """The layout of a result: its source's, or with one tensor for each matrix. Raises ValueError if nothing would load that."""
    if how == "source" or not layout.stacked:
        return layout
    if not layout.per_expert or any(s.name.endswith(BLOCKS) for s in layout.stacked):
        raise ValueError(
            f"layout=per_expert: transformers reads the experts of a {family.arch.model_type} checkpoint like this in stacks only; "
            "leave it at layout=source"
        )
    renamed = tuple(pair for pair in layout.renamed if "{layer}" not in pair[0])  # inside a layer they go with the stacks
    return replace(layout, stacked=(), renamed=renamed)


def _where_it_is(stack: Stacked, tensors: Iterable[str], layout: Layout, family: Family) -> Stacked:
    """The stack, with the layers that have it if another has one tensor for each matrix instead, as it stays then."""
    ours = [layout.here(n) for n in tensors]
    single = any((layer := layer_of(n)) is not None and n in stack.names(layer, 0) for n in ours)
    return replace(stack, layers=tuple(sorted(i for n in tensors if (i := stack.layer(n)) is not None))) if single else stack


def _as_it_lies(stack: Stacked, tensors: Mapping[str, TensorInfo], family: Family, uri: str) -> Stacked:
    """The stack, transposed as these tensors are. Their sizes tell, where they can: checkpoints of one family differ in this."""
    asked = _asked(stack, family)
    for name, info in tensors.items():
        if stack.layer(name) is None or asked is None or len(asked) != 2:
            continue
        inner = info.shape[1:]
        if inner != asked and inner[::-1] != asked:
            whole = (family.num_experts, *(asked[::-1] if stack.transposed else asked))
            raise ValueError(f"{name} at {uri} has shape {info.shape} where config.json asks for {whole}; correct one of them")
        if inner != inner[::-1]:
            return replace(stack, transposed=inner != asked)
    return stack


def _unstacked(where: str, info: TensorInfo, stack: Stacked, layer: int, family: Family) -> dict[str, TensorInfo]:
    """The matrices of all experts in a stack. `where` begins a message."""
    if len(info.shape) < 2 or not all(info.shape) or info.dtype == "F4":
        raise ValueError(f"{where} and dtype {info.dtype}, which is no stack of experts; fetch it again")
    experts, parts, inner = family.num_experts, len(stack.parts), info.shape[1:]
    if info.shape[0] != experts:
        raise ValueError(f"{where}: {info.shape[0]} experts where config.json says {family.experts_key}={experts}; correct one")
    turned = stack.transposed and len(inner) == 2
    shape, asked = inner[::-1] if turned else inner, _asked(stack, family)
    if asked is not None and shape != asked:
        whole = (experts, *(asked[::-1] if turned else asked))
        raise ValueError(f"{where} where config.json asks for {whole}; correct one of them")
    if shape[0] % parts:
        raise ValueError(f"{where}, whose {shape[0]} rows are not those of {parts} matrices; fetch it again")
    rows, size = shape[0] // parts, info.nbytes // experts
    made: dict[str, TensorInfo] = {}
    for expert in range(experts):
        for part, name in enumerate(stack.names(layer, expert)):
            start, length = info.start + expert * size, size
            view: View | None = None
            if turned or (stack.interleaved and parts > 1):
                view = (inner, turned, *((part, parts) if stack.interleaved else (part * rows, 1)))
            else:
                length = size // parts
                start += part * length
            made[name] = Piece(info.file, info.dtype, (rows, *shape[1:]), start, start + length, view)
    return made


def _asked(stack: Stacked, family: Family) -> tuple[int, ...] | None:
    """The shape that config.json asks for of one expert in a stack that is not transposed; None if it cannot be told."""
    width, inner = family.size("hidden_size"), family.expert_size
    end = next((end for end in (BLOCKS, SCALES) if stack.name.endswith(end)), "")
    first = stack.parts[0].removesuffix(end)
    if width is None or inner is None or first not in (*family.arch.experts, *family.arch.expert_biases):
        return None
    down = first in (family.arch.experts[-1], *family.arch.expert_biases[-1:])
    rows, columns = (width, inner) if down else (inner * len(stack.parts), width)
    if first in family.arch.expert_biases:
        return (rows,)
    if end:  # each 32 codes, in 16 bytes, share a scale
        return (rows, columns // (2 * CODES), CODES)[: 3 if end == BLOCKS else 2]
    return rows, columns


def is_plain(entry: Sequence[Any]) -> bool:
    """Whether the bytes of a table's entry are the tensor, and not a part or the transpose of what lies there."""
    return len(entry) <= PLACE


def view_of(raw: "Tensor", entry: Sequence[Any]) -> "Tensor":
    """The tensor of a table's entry in the bytes that it shares with others."""
    if is_plain(entry):
        return raw
    _, turned, first, step = entry[PLACE]
    rows = entry[2][0]
    return (raw.T if turned else raw)[first : first + (rows - 1) * step + 1 : step]


def place(file: str, entry: Sequence[Any]) -> TensorInfo:
    """Where the bytes of a table's entry lie in the file, and their shape there."""
    shape = entry[2] if is_plain(entry) else entry[PLACE][0]
    return TensorInfo(file, entry[1], tuple(shape), entry[3], entry[4])


def table_of(tensors: Mapping[str, TensorInfo], shards: Sequence[str]) -> dict[str, list[Any]]:
    """The place of each tensor, as a parameter of the step that reads it (`steps.Table`)."""
    table = {}
    for name, t in sorted(tensors.items()):
        table[name] = [shards.index(t.file), t.dtype, list(t.shape), t.start, t.stop]
        if isinstance(t, Piece) and t.view is not None:
            table[name].append([list(t.view[0]), *t.view[1:]])
    return table


def bytes_read(tensors: Mapping[str, Sequence[Any]]) -> int:
    """The bytes that the step of this table reads: a range that several tensors share counts once."""
    return sum(stop - start for _, start, stop in {(entry[0], entry[3], entry[4]) for entry in tensors.values()})
