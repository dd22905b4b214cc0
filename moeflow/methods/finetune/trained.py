"""Write trained parameters to disk: first as they are in memory, then as layer files under the hub's names.

All processes do the first together, parameter by parameter, because each may have only a part. Rank 0 does the second from these
files, one decoder layer at a time. Shapes are suffixes: E experts, M rows, N columns.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moeflow.arch import EMBEDDING, HEAD, Config, Family, layer_of
from moeflow.methods.finetune.lora import ADDITIONS, CODES, ENDINGS, SCALES, A, B, product
from moeflow.methods.finetune.packed import SCALES_PACE, codes_pace, recoded
from moeflow.methods.finetune.recipe import Recipe
from moeflow.methods.graph import REST
from moeflow.model.checkpoint import Tensors, save
from moeflow.model.factors import PLAIN, STACKS
from moeflow.model.formats import Format, format_of
from moeflow.model.layout import Files, file_for
from moeflow.model.packed import ADDED_IN, ADDED_OUT, PACKED, SCALE, Scheme, scheme_of
from moeflow.model.passes import expert_form


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name; what is trained of a matrix is named after it, with the endings of `lora.ENDINGS`."""
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path, added, last = name.partition(f"{ADDITIONS}.")
            matrix, _, factor = last.rpartition(".")
            trained[f"{path}{matrix}{ENDINGS[factor]}" if added else name] = parameter
    return trained


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to: "layer-000" and so on, or "rest"."""
    layer = layer_of(name)
    return "rest" if layer is None else f"layer-{layer:03d}"


def collect(model: nn.Module, folder: Path, *, writes: bool) -> None:
    """Gather the trained parameters one at a time; the process that `writes` stores a file per layer. All processes call it."""
    from deepspeed.runtime.zero import GatheredParameters

    trained = parameters_of(model)
    for part in sorted(set(map(part_of, trained))):
        tensors: dict[str, Tensor] = {}
        for name, parameter in trained.items():
            if part_of(name) == part:
                with GatheredParameters([parameter]):  # a no-op unless ZeRO-3 has divided it
                    if writes:
                        tensors[name] = parameter.detach().to("cpu", copy=True)
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            save(tensors, folder / f"{part}.safetensors")


def write(checkpoint: Files, config: Config, folder: Path, out: Path, recipe: Recipe) -> Iterator[str]:
    """Write `layer-000/layer.safetensors` and so on, and `rest/rest.safetensors`, from what `collect` left in `folder`.

    A file is written, whole, if something in it was trained: under the hub's names, in the checkpoint's own precision, with LoRA's
    additions multiplied and added in fp32. Packed matrices stay packed: what was added to them is kept beside them, as two factors,
    or their scales and codes are the trained ones. Yields the name of each layer once it is written.
    """
    tensors = Tensors(checkpoint)
    for file in sorted(folder.glob("*.safetensors")):
        files = {n: REST if file.stem == "rest" else file_for(n) for n in tensors if part_of(n) == file.stem}
        changed = tensors_of(load_file(file), tensors, config, recipe)
        if config.get("tie_word_embeddings") and HEAD in files and EMBEDDING in changed:
            changed[HEAD] = changed[EMBEDDING]
        (out / file.stem).mkdir(parents=True, exist_ok=True)
        for name in sorted({_file_of(n, files) for n in changed}):
            save(_file([n for n in files if files[n] == name], tensors, changed, recipe), out / file.stem / name)
        yield file.stem


def _file_of(name: str, files: Mapping[str, str]) -> str:
    """The file that something trained belongs to: a tensor, or the scales or codes of a packed one.

    Raises RuntimeError if there is none: what was trained would be lost without a word.
    """
    matrix = next((n for n in (name, name.removesuffix(SCALE), name.removesuffix(PACKED)) if n in files), None)
    if matrix is None:
        raise RuntimeError(f"{name} was trained, and the checkpoint has no such tensor")
    return files[matrix]


def _file(names: Iterable[str], tensors: Tensors, changed: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """The tensors of one file: packed matrices in their parts, and what was trained of them beside these, in factors."""
    written: dict[str, Tensor] = {}
    for name in names:
        if packed := tensors.packed(name):
            written |= packed
            if name in changed:
                written |= _beside(name, packed, changed[name], recipe.rank)
            if name + SCALE in changed:
                scale_MG = packed[name + SCALE]
                written[name + SCALE] = (scale_MG.float() * (1 + changed[name + SCALE].float())).to(scale_MG.dtype)
            if name + PACKED in changed:
                written[name + PACKED] = recoded({n.removeprefix(name): t for n, t in packed.items()}, changed[name + PACKED])
        else:
            before = tensors[name]
            written[name] = changed.get(name, before).to(before.dtype)
    return written


def _beside(name: str, packed: Mapping[str, Tensor], added_MN: Tensor, rank: int) -> dict[str, Tensor]:
    """The two factors beside a packed matrix, those that are there already first."""
    both = factored(added_MN, rank)
    if name + ADDED_OUT in packed:
        before_MR, before_RN = (packed[name + end].float() for end in (ADDED_OUT, ADDED_IN))
        both = torch.cat([before_MR, both[0]], dim=1), torch.cat([before_RN, both[1]])
    return {name + end: t.to(packed[name + SCALE].dtype) for end, t in zip((ADDED_OUT, ADDED_IN), both, strict=True)}


def factored(product_MN: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors [M, R] and [R, N] of a matrix of this rank at most: an orthogonal basis of its columns, and what each takes of
    it. Random mixtures of the columns span them all (Halko et al., arXiv 0909.4061, 4.1)."""
    rank = min(rank, *product_MN.shape)
    mixed_NR = torch.randn(product_MN.shape[1], rank, generator=torch.Generator().manual_seed(0)).to(product_MN)
    basis_MR, _ = torch.linalg.qr(product_MN @ mixed_NR)
    return basis_MR, basis_MR.T @ product_MN


def tensors_of(trained: Mapping[str, Tensor], tensors: Tensors, config: Config, recipe: Recipe) -> dict[str, Tensor]:
    """The trained parameters of one layer, or of the rest, as tensors on disk; LoRA's additions are added, in fp32, to the existing
    tensors. Of a packed matrix only what is to be added is here, or how its scales [M, G] and codes [M, N] change, under their own
    names."""
    family, layer = Family.of(config), layer_of(next(iter(trained)))
    shapes = {n: t.shape for n, t in tensors.info.items() if layer_of(n) == layer}
    format = Format(0) if layer is None else format_of(shapes, config, layer)
    on_disk: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        if name.endswith(B):
            continue
        if name.endswith(SCALES):
            on_disk |= _scales(family, format, name.removesuffix(SCALES), parameter, scheme_of(shapes, config))
            continue
        if name.endswith(CODES):
            pieces = _pieces(family, format, layer, name.removesuffix(CODES), codes_pace(recipe.steps) * parameter.float())
            on_disk |= {disk + PACKED: piece_MN for disk, piece_MN in pieces}
            continue
        adds = name.endswith(A)
        plain = name.removesuffix(A)
        value = product(parameter, trained[plain + B], recipe.scale) if adds else parameter
        for disk, piece in _pieces(family, format, layer, plain, value):
            if adds and recipe.keep_zeros and family.in_expert(disk):
                piece = piece * (tensors[disk] != 0)
            on_disk[disk] = tensors[disk].float() + piece if adds and disk + PACKED not in tensors.info else piece
    return on_disk


def _scales(family: Family, format: Format, name: str, scales_EMG: Tensor, scheme: Scheme | None) -> dict[str, Tensor]:
    """How the scales [M, G] of each packed matrix of a stack change, as a part of what they are."""
    group = scheme.group if scheme else 0
    out = group > 0 and name.endswith("_out")  # their columns are ranks, as many as each expert has
    change_EMG = SCALES_PACE * scales_EMG
    spread = change_EMG.repeat_interleave(group, dim=2) if out else change_EMG
    return {disk + SCALE: p[:, ::group] if out else p for disk, p in _pieces(family, format, layer_of(name), name, spread)}


def _pieces(family: Family, format: Format, layer: int | None, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One parameter with its name on disk, or each matrix of a stack of experts with its own."""
    stack = next((s for s in STACKS if name == f"{family.prefix(layer or 0)}{family.arch.block}.experts.{s.name}"), None)
    if stack is None or layer is None:
        yield family.on_disk(name), value
    else:
        if stack.factors and value.dim() == 3:  # what LoRA adds
            value = stack.joined(value, format)
        form = PLAIN if format.own else expert_form(family.config, layer)
        for matrix, expert, piece_MN in stack.pieces(value, format, form):
            yield stack.on_disk(family, layer, matrix, expert), piece_MN
