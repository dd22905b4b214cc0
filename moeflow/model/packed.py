"""Quantized matrices on disk: as compressed-tensors packs them, codes in words of 32 bits, scales, and the shape of the whole; and
as DeepSeek-V3 is published, in FP8 with a scale for each block.

Names without torch; the tensors themselves are packed and unpacked by the library. Shapes are suffixes: M outputs and N inputs of a
matrix, G groups of inputs, P words of a row.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from moeflow.arch import Config, arch_of

if TYPE_CHECKING:
    from torch import Tensor

WHOLE, PACKED, SCALE, SHAPE, ZERO = ".weight", ".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point"
BESIDE = (SCALE, SHAPE, ZERO)
BLOCK_SCALE = ".weight_scale_inv"
"""What an FP8 matrix's blocks are multiplied with (DeepSeek-V3, arXiv 2412.19437, 3.3.2), in spite of its name."""

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint's matrices are packed: bits a weight, and weights of a row that share a scale (0: all)."""

    bits: int
    group: int

    def words(self) -> str:
        return f"{self.bits} bits, " + (f"groups of {self.group}" if self.group else "one scale a row")


def packed_name(name: str) -> str:
    """What stands on disk in the place of the matrix `name` where it is packed."""
    return name.removesuffix(WHOLE) + PACKED


def logical(names: Iterable[str]) -> list[str]:
    """The names of the matrices that these tensors stand for, packed or not."""
    held = list(names)
    stems = {n.removesuffix(PACKED) for n in held if n.endswith(PACKED)}
    beside = {stem + end for stem in stems for end in BESIDE}
    beside |= {n.removesuffix(WHOLE) + BLOCK_SCALE for n in held if n.endswith(WHOLE)}
    return [n.removesuffix(PACKED) + WHOLE if n.endswith(PACKED) else n for n in held if n not in beside]


def packed_shapes(shapes: Shapes, config: Config) -> dict[str, tuple[int, int]]:
    """Of each packed matrix, by its whole name, the shape [M, N] that it has when unpacked, told by its neighbours' shapes."""
    arch, found = arch_of(config), {}
    gate, down = (template.split(".")[-2] for template in (arch.gate, arch.down))
    for name, shape in shapes.items():
        if name.endswith(PACKED):
            stem = name.removesuffix(PACKED)
            block, _, matrix = stem.rpartition(".")
            beside = f"{block}.{gate}"
            inner = shapes.get(beside + PACKED) or shapes.get(beside + WHOLE) or (0,)
            found[stem + WHOLE] = int(shape[0]), int(inner[0] if matrix == down else config["hidden_size"])
    return found


def numels(shapes: Shapes, config: Config) -> dict[str, int]:
    """How many weights each of these tensors stands for, by the names of the matrices."""
    whole = packed_shapes(shapes, config)
    return {n: prod(whole.get(n, shapes.get(n, ()))) for n in logical(shapes)}


def scheme_of(shapes: Shapes, config: Config) -> Scheme | None:
    """How the packed ones of these tensors are packed, None where there are none. Raises ValueError where they differ."""
    found: dict[Scheme, str] = {}
    for name, (_, columns) in packed_shapes(shapes, config).items():
        stem = name.removesuffix(WHOLE)
        if stem + ZERO in shapes:
            raise ValueError(f"{stem} has zero points, with which transformers loads no experts; quantize symmetrically")
        groups = int(shapes[stem + SCALE][1])
        scheme = Scheme(round(int(shapes[stem + PACKED][1]) * 32 / columns), columns // groups if groups > 1 else 0)
        found.setdefault(scheme, name)
    if len(found) > 1:
        differ = " and ".join(f"{name} {scheme.words()}" for scheme, name in [*found.items()][:2])
        raise ValueError(f"{differ}: transformers loads experts of one scheme only; quantize all alike")
    return next(iter(found), None)


def check_whole(shapes: Shapes, layer: int, config: Config, experts: int) -> None:
    """Raise ValueError where some of a layer's experts are packed and others are not: transformers loads no such layer."""
    arch = arch_of(config)
    names = [n for e in range(experts) for n in arch.expert(layer, e)]
    packed = [n for n in names if packed_name(n) in shapes]
    if packed and len(packed) < len(names):
        other = next(n for n in names if packed_name(n) not in shapes)
        raise ValueError(f"{packed[0]} is packed and {other} is not: transformers loads no such layer; quantize both or neither")


def quantization_config(scheme: Scheme, shapes: Shapes, config: Config) -> dict[str, Any]:
    """What config.json says of a checkpoint packed so, for transformers and vLLM: what is not packed is ignored by its name."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group or None,
        "dynamic": False,
        "observer": "minmax",
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None, "format": FORMAT}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
        # a head that is tied to the embedding has no tensor, and is a module like any other
        "ignore": sorted({"lm_head"} | {_pattern(n.removesuffix(WHOLE), config) for n, s in shapes.items() if _is_matrix(n, s)}),
    }


def _is_matrix(name: str, shape: Sequence[int]) -> bool:
    return name.endswith(WHOLE) and len(shape) == 2


def _pattern(module: str, config: Config) -> str:
    """A module's name on disk as an entry of `ignore`: one for all layers where they agree, good for its name in memory, too."""
    arch = arch_of(config)
    parts = module.split(".")
    if parts[:2] != ["model", "layers"]:
        return module
    layer, tail = parts[2], ".".join(parts[3:])
    if tail.startswith("self_attn."):
        return "re:.*self_attn.*"
    tail = tail.replace("block_sparse_moe", "(block_sparse_moe|mlp)")
    if module + WHOLE == arch.router.format(layer=layer):
        return f"re:.*{tail.rpartition('.')[0]}[.](gate|router)$"
    if int(layer) in arch.moe_layers(config):
        return f"re:.*[.]{tail}$"
    return module


def pack(codes_MN: "Tensor", scale_MG: "Tensor", bits: int) -> "dict[str, Tensor]":
    """What stands on disk for signed codes (int8) on a symmetric grid, by the end of its name."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return {PACKED: pack_to_int32(codes_MN, bits), SCALE: scale_MG.contiguous(), SHAPE: torch.tensor(codes_MN.shape)}


def unpack(packed_MP: "Tensor", scale_MG: "Tensor", shape: "Tensor") -> "Tensor":
    """The matrix [M, N] that codes on a symmetric grid stand for, in the precision of its scales."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    rows, columns = (int(n) for n in shape)
    codes_MN = unpack_from_int32(packed_MP, round(packed_MP.shape[1] * 32 / columns), (rows, columns))
    whole_MGg = codes_MN.float().unflatten(1, (scale_MG.shape[1], -1)) * scale_MG.float()[..., None]
    return whole_MGg.flatten(1).to(scale_MG.dtype)


def unblocked(codes_MN: "Tensor", scale_BC: "Tensor") -> "Tensor":
    """The matrix [M, N], fp32, that FP8 codes stand for, with a scale [B, C] for each square block of them.

    A block's side is the power of two by which the shapes go together, as the last blocks may be cut off; 128 as published.
    """
    sides = []
    for size, blocks in zip(codes_MN.shape, scale_BC.shape, strict=True):
        side = 1
        while side * blocks < size:
            side *= 2
        sides.append(side)
    scale_MN = scale_BC.float().repeat_interleave(sides[0], 0).repeat_interleave(sides[1], 1)
    return codes_MN.float() * scale_MN[: codes_MN.shape[0], : codes_MN.shape[1]]
