"""A model's layer files, written as its source was: stacks of experts, other names, inside a multimodal model. No torch to plan.

Stacks and names are of one layout for all layers. Where layers differ, or experts are low-rank or packed, there is no such stack:
the result then has one tensor for each matrix, and is the text model alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeflow.arch import ARCH, COMPRESSED, Config, Layout, Stacked
from moeflow.methods.checkpoint.intake import FROM_THE_WHOLE
from moeflow.methods.graph import Form, Model
from moeflow.model.header import TensorInfo
from moeflow.model.packed import METHOD
from moeflow.model.spec import LayerSpec, TensorTable

if TYPE_CHECKING:
    from torch import Tensor

    from moeflow.model.layout import Files

BESIDE = "beside.safetensors"
"""The file of the tensors of a multimodal model that are no part of its text model."""


@dataclass(frozen=True)
class Written:
    """How a checkpoint is written."""

    layout: Layout
    own: bool  # in moeflow's format, whatever the layers turn out to be
    as_source: bool  # its config.json is the source's with other numbers, and what is beside the text model stays
    note: str = ""  # what is other than in the source, and why


def written(model: Model, form: Form) -> Written:
    """How the model is written: as its source, unless its layers cannot be.

    Raises ValueError if transformers reads it neither way.
    """
    packed = (form.whole.get("quantization_config") or {}).get("quant_method") == METHOD
    layers = [layer.spec.output for layer in model.layers]
    differ, packs = _apart(layers, model.moe_layers), "" if packed else _packed(layers)
    why, wrapper = differ or packs, bool(form.layout.inside)
    if not why:
        ours = str(form.whole.get("model_type")).startswith(COMPRESSED)
        own = ours or ARCH in form.whole  # moeflow's own result, whose family may have no such form of its own
        return Written(form.layout, own=own, as_source=not own)
    coded = next((i for i in model.moe_layers if model.layers[i].spec.output.mxfp4), None)
    if coded is not None:
        raise ValueError(
            f"{why}, and layer {coded} is in MXFP4, which transformers reads from stacks of one number of experts only; keep as "
            "many in every layer, or start from the model in bf16"
        )
    # names outside the layers, which moeflow's own format has as they are here
    renamed = () if wrapper else tuple(pair for pair in form.layout.renamed if "{layer}" not in pair[0])
    own = (bool(form.layout.stacked) and not form.layout.per_expert) or bool(renamed and differ)
    left = f", and is the text model alone, without {', '.join(form.layout.beside)}" if wrapper else ""
    changed = bool(form.layout.stacked) or wrapper
    note = f"{why}: the result has one tensor for each matrix of an expert{left}" if changed else ""
    return Written(replace(form.layout.plain(), renamed=() if own else renamed), own=own, as_source=False, note=note)


def _apart(layers: Sequence[LayerSpec], moe: Sequence[int]) -> str:
    """Why the family's own classes cannot hold these layers; empty if they can."""
    experts = [layers[i] for i in moe]
    if len({layer.experts for layer in experts}) > 1 or any(layer.least != layer.experts and not layer.alike for layer in experts):
        return "layers differ in their experts, or a run decides it"
    if len({layer.packed for layer in experts}) > 1 or any(layer.bits_decided for layer in experts):
        return "layers differ in how their experts are packed, or a run decides it"
    for layer in experts:
        if layer.low_rank or layer.ranks_decided or layer.format.own or layer.format.added:
            return f"the experts of layer {layer.layer} differ from the family's own ({layer.format.words()})"
    gone = next((layer for layer in layers if layer.format.gone), None)
    return f"layers differ: layer {gone.layer} has {gone.format.words()}" if gone else ""


def _packed(layers: Sequence[LayerSpec]) -> str:
    """Why no stack can hold the experts of these layers; empty if one can."""
    return next((f"the experts of layer {i.layer} are packed in {i.packed.words()}" for i in layers if i.packed), "")


def result(text: Config, whole: Config, layout: Layout) -> Config:
    """The config.json of a result: `whole`, the source's, with what has changed in the text model's configuration.

    Every other key stays as and where it was.
    """
    source = whole
    for key in layout.inside:
        source = source[key]
    ours = (ARCH, "architectures", "model_type", *FROM_THE_WHOLE) if layout.inside else (ARCH,)
    changed = {k: v for k, v in text.items() if k not in ours and (k not in source or source[k] != v)}
    return _inside(whole, layout.inside, changed, {k for k in source if k not in text and k not in ours})


def _inside(whole: Config, path: Sequence[str], changed: Config, gone: set[str]) -> Config:
    if path:
        return whole | {path[0]: _inside(whole[path[0]], path[1:], changed, gone)}
    return {k: v for k, v in whole.items() if k not in gone} | changed


def without_arch(config: Config) -> Config:
    """A config.json without the description of its family, which only a checkpoint in moeflow's own format needs."""
    own = str(config.get("model_type")).startswith(COMPRESSED)
    return config if own else {k: v for k, v in config.items() if k != ARCH}


def table(tensors: TensorTable, layout: Layout, layer: int | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of one layer, or of the rest, in this layout: name on disk to (dtype, shape)."""
    made: dict[str, tuple[str, tuple[int, ...]]] = {}
    stacked: set[str] = set()
    for name, stack, parts in _stacks(tensors, layout, layer):
        dtype, (rows, *others) = tensors[parts[0][0]]
        inner = (rows * len(stack.parts), *others)
        made[name] = dtype, (len(parts), *(inner[::-1] if _turned(stack, inner) else inner))
        stacked |= {n for expert in parts for n in expert}
    made |= {layout.on_disk(n): t for n, t in tensors.items() if n not in stacked}
    return {layout.in_file(n): t for n, t in made.items()}


def write(files: "Files", tensors: Mapping[str, TensorInfo], layout: Layout, layer: int | None, path: Path) -> None:
    """Write one layer, or the rest, in this layout: each stack is bit for bit what the source's would be with these experts."""
    import torch

    from moeflow.model.checkpoint import read_many, save

    read = dict(read_many(files, tensors))
    made = {}
    for name, stack, parts in _stacks(tensors, layout, layer):
        made[name] = torch.stack([_joined(stack, [read.pop(n) for n in expert]) for expert in parts])
    made |= {layout.on_disk(n): t for n, t in read.items()}
    save({layout.in_file(n): t for n, t in made.items()}, path)


def _joined(stack: Stacked, parts: Sequence["Tensor"]) -> "Tensor":
    import torch

    one = torch.stack(list(parts), 1).flatten(0, 1) if stack.interleaved else torch.cat(list(parts))
    return one.T if _turned(stack, one.shape) else one


def _turned(stack: Stacked, inner: Sequence[int]) -> bool:
    return stack.transposed and len(inner) == 2


def _stacks(names: Mapping[str, Any], layout: Layout, layer: int | None) -> Iterator[tuple[str, Stacked, list[tuple[str, ...]]]]:
    """The stacks of a layer: the name on disk, and the names here of each expert's parts."""
    for stack in layout.stacked if layer is not None else ():
        if stack.layers is not None and layer not in stack.layers:
            continue
        parts: list[tuple[str, ...]] = []
        while (expert := stack.names(layer, len(parts)))[0] in names:  # type: ignore[arg-type]
            parts.append(expert)
        if parts:
            yield stack.name.format(layer=layer), stack, parts
