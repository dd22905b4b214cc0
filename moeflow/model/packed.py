"""Quantized matrices on disk, in three forms.

Packed by compressed-tensors: codes in words of 32 bits, scales, and the unpacked shape; a fine-tuning may leave two factors beside
them, whose product is added when they are unpacked. In FP8 with a scale for each block, as DeepSeek-V3 is published. In MXFP4, as
gpt-oss is: 4-bit floats, of which 32 share a power of two. Torch is imported only to pack and unpack. Shapes are suffixes: M
outputs and N inputs of a matrix, G groups of inputs, P words of a row, R ranks of an addition, B and C blocks of rows and columns.
"""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from moeflow.arch import HEAD, Config, Family, layer_of

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = ".weight"
PACKED, SCALE, SHAPE, ZERO = "_packed", "_scale", "_shape", "_zero_point"
"""The endings of the tensors that replace a matrix, or a factor of one, on disk."""
ADDED_OUT, ADDED_IN = "_added_out", "_added_in"
"""The endings of two factors, [M, R] and [R, N], whose product is added to the packed matrix (LoRA, arXiv 2106.09685)."""
BESIDE = (SCALE, SHAPE, ZERO, ADDED_OUT, ADDED_IN)
BLOCK_SCALE = "_scale_inv"
"""The ending of the scales that the blocks of an FP8 matrix are multiplied with (DeepSeek-V3, arXiv 2412.19437, 3.3.2). They are
no inverse, in spite of the name."""
OTHER_SCALE = ".scale"
"""The same in place of the matrix's own ending, as DeepSeek-V4 has them: a power of two for each block (F8_E8M0)."""

BLOCKS, SCALES = "_blocks", "_scales"
"""The endings of the tensors that replace a matrix in MXFP4: codes [M, G, `CODES`], two in a byte, the first in its low half, and
exponents [M, G] of two (OCP Microscaling Formats, 1.0, 5.2 and 5.4), uint8."""
CODES = 16
"""The bytes of the codes that share a scale."""
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of the codes 0 to 7; those of 8 to 15 are the same, negative."""
BIAS = 127
"""What is subtracted from a stored exponent; 255 is no number."""

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
MXFP4 = "mxfp4"
"""The quant_method of a checkpoint in MXFP4."""
Shapes = Mapping[str, Sequence[int]]
PATTERN = "re:"
"""How an entry of a quantization_config begins that is a pattern of names."""


@dataclass(frozen=True)
class Scheme:
    """How matrices are packed: bits of a weight, and how many weights of a row share a scale (0: all)."""

    bits: int
    group: int
    symmetric: bool = True
    """Without zero points beside the scales."""

    def words(self) -> str:
        zeros = "" if self.symmetric else ", with zero points"
        return f"{self.bits} bits, " + (f"groups of {self.group}" if self.group else "one scale a row") + zeros


def block_scale(name: str, names: Container[str]) -> str | None:
    """The name of the scales of a matrix in FP8 with this name; None if it has none."""
    either = name + BLOCK_SCALE, name.removesuffix(WHOLE) + OTHER_SCALE
    return next((n for n in either if n in names), None)


def logical(names: Iterable[str]) -> list[str]:
    """The names of the matrices of these tensors, packed or not."""
    stored = dict.fromkeys(names)
    packed = {n.removesuffix(PACKED) for n in stored if n.endswith(PACKED)}
    beside = {name + end for name in packed for end in BESIDE} | {block_scale(n, stored) for n in stored}
    beside |= {n.removesuffix(BLOCKS) + SCALES for n in stored if n.endswith(BLOCKS)}
    return [n.removesuffix(PACKED).removesuffix(BLOCKS) for n in stored if n not in beside]


def packed_shapes(shapes: Shapes, config: Config) -> dict[str, tuple[int, int]]:
    """The unpacked shape [M, N] of every packed matrix or factor, inferred from its neighbours."""
    family, unpacked = Family.of(config), {}

    def rows(name: str) -> int:
        """The outputs of a matrix, whole or factored."""
        stored = (shapes.get(n + end) for n in (name, family.factors(name)[0]) for end in (PACKED, ""))
        return int(next((shape[0] for shape in stored if shape), 0))

    for packed, shape in shapes.items():
        if packed.endswith(PACKED):
            name = packed.removesuffix(PACKED)
            whole = name.rpartition(".")[0] + WHOLE
            out, within = family.factors(whole)
            gate = family.gate_beside(whole)
            columns = config["hidden_size"] if gate is None else rows(gate)
            unpacked[name] = int(shape[0]), rows(within) if name == out else int(columns)
        elif packed.endswith(BLOCKS) and len(shape) == 3:
            unpacked[packed.removesuffix(BLOCKS)] = int(shape[0]), int(shape[1]) * 2 * int(shape[2])
    return unpacked


def unpacked_shapes(shapes: Shapes, config: Config) -> dict[str, tuple[int, ...]]:
    """The names and shapes of these tensors, of packed matrices as if they were not."""
    whole = packed_shapes(shapes, config)
    return {n: tuple(whole.get(n, shapes.get(n, ()))) for n in logical(shapes)}


def numels(shapes: Shapes, config: Config) -> dict[str, int]:
    """The number of weights of each matrix, packed or not."""
    return {n: prod(shape) for n, shape in unpacked_shapes(shapes, config).items()}


def scheme_of(shapes: Shapes, config: Config) -> Scheme | None:
    """How the packed matrices are packed; None if there are none. Raises ValueError if they differ, or are not whole."""
    for name in (n.removesuffix(PACKED) for n in shapes if n.endswith(PACKED)):
        for part in (PACKED, SCALE, SHAPE):
            if len(shapes.get(name + part, ())) != 1 + (part != SHAPE):
                raise ValueError(f"{name}{part} is missing, or has another shape than its kind; fetch the checkpoint again")
        rows, scaled = (int(shapes[name + part][0]) for part in (PACKED, SCALE))
        if rows != scaled:
            raise ValueError(f"{name}{PACKED} has {rows} rows and {name}{SCALE} {scaled}; fetch the checkpoint again")
    schemes: dict[Scheme, str] = {}
    single: dict[Scheme, str] = {}  # one scale a row, which a group of the row's length has, too
    for name, (_, columns) in packed_shapes(shapes, config).items():
        if name + PACKED not in shapes:
            continue
        groups, words = int(shapes[name + SCALE][1]), int(shapes[name + PACKED][1])
        if not (groups and columns) or columns % groups or not 1 <= round(words * 32 / columns) <= 8:
            raise ValueError(
                f"{name} is packed: {words} words and {groups} scales a row for {columns} inputs; fetch the checkpoint again"
            )
        scheme = Scheme(round(words * 32 / columns), columns // groups, name + ZERO not in shapes)
        needed = zeros_shape(int(shapes[name + PACKED][0]), groups, scheme.bits)
        if not scheme.symmetric and tuple(shapes[name + ZERO]) != needed:
            raise ValueError(f"{name}{ZERO} has shape {tuple(shapes[name + ZERO])}, not {needed}; fetch the checkpoint again")
        (schemes if groups > 1 else single).setdefault(scheme, name)
    for scheme, name in single.items():
        if scheme not in schemes:
            schemes.setdefault(replace(scheme, group=0), name)
    if len(schemes) > 1:
        differ = " and ".join(f"{name} {scheme.words()}" for scheme, name in [*schemes.items()][:2])
        raise ValueError(f"{differ}: a layer's experts are packed by one scheme only; quantize all alike")
    return next(iter(schemes), None)


def check_added(shapes: Shapes, config: Config) -> None:
    """Raise ValueError if what is added to some packed matrices does not fit them, or is not added to all of a layer's experts."""
    whole = packed_shapes(shapes, config)
    added = {n.removesuffix(end) for n in shapes for end in (ADDED_OUT, ADDED_IN) if n.endswith(end)}
    for name in sorted(added):
        out, within = (tuple(shapes.get(name + end, ())) for end in (ADDED_OUT, ADDED_IN))
        if name not in whole or name + PACKED not in shapes:
            raise ValueError(f"{name}{ADDED_OUT} is to be added to {name}, which is not packed; fetch the checkpoint again")
        rows, columns = whole[name]
        if len(out) != 2 or len(within) != 2 or out[1] != within[0] or (out[0], within[1]) != (rows, columns):
            raise ValueError(
                f"{name}{ADDED_OUT} {out} and {name}{ADDED_IN} {within} give no {rows} x {columns} together; fetch the checkpoint "
                "again"
            )
    layers = {layer for n in added if (layer := layer_of(n)) is not None}
    for stem in map(Family.of(config).experts, layers):
        if lacking := next((n for n in whole if n.startswith(stem) and n not in added), None):
            raise ValueError(f"{lacking}{ADDED_OUT} is missing, which others of its layer have; fetch the checkpoint again")


def zeros_shape(rows: int, groups: int, bits: int) -> tuple[int, int]:
    """The shape of packed zero points, of which those of a column of groups share words."""
    return ceil(rows * bits / 32), groups


def asymmetric(config: Config) -> bool:
    """Whether packed matrices have zero points, by the `quantization_config` of a config.json."""
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    return any((g.get("weights") or {}).get("symmetric") is False for g in groups.values() if isinstance(g, Mapping))


def check_zeros(names: Container[str], packed: Iterable[str], config: Config, where: str) -> None:
    """Raise ValueError if packed matrices have zero points where config.json says none, or the other way round."""
    wanted = asymmetric(config)
    if odd := next((n for n in packed if (n + ZERO in names) != wanted), None):
        what = "no zero points" if wanted else "zero points"
        raise ValueError(f"{where}: {odd} has {what}, and config.json says symmetric={not wanted} of it; correct one of them")


def schemes_of(shapes: Shapes, config: Config) -> dict[int, Scheme]:
    """How each decoder layer that has packed matrices is packed, by its number. Raises ValueError as `scheme_of` does."""
    layers: dict[int, dict[str, Sequence[int]]] = {}
    for name, shape in shapes.items():
        if (layer := layer_of(name)) is not None:
            layers.setdefault(layer, {})[name] = shape
    return {i: scheme for i in sorted(layers) if (scheme := scheme_of(layers[i], config)) is not None}


def check_schemes(said: Mapping[str, Any], schemes: Mapping[int, Scheme], config: Config, where: str) -> None:
    """Raise ValueError if a `quantization_config` says that weights are packed in another way than their tensors are.

    `schemes`: how each layer's tensors are; `where` names the entry. What it leaves out is not asked for.
    """
    groups = said.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        raise ValueError(f"{where}.config_groups is no object of objects; correct it, or fetch it again")
    for group, entry in groups.items():
        weights, here = entry.get("weights") or {}, f"{where}.config_groups.{group}.weights"
        if not isinstance(weights, Mapping):
            raise ValueError(f"{here} is no object; correct it, or fetch it again")
        meant = _meant(entry.get("targets"), schemes, config, f"{where}.config_groups.{group}.targets")
        for scheme in dict.fromkeys(meant):
            known: dict[str, tuple[Any, ...]] = {"type": ("int",), "strategy": ("group", "channel")}
            known["symmetric"] = (scheme.symmetric,)
            known["num_bits"] = (scheme.bits,)
            if scheme.group:  # one scale a row may be a group of the row's length, too
                known["group_size"] = (scheme.group,)
            for name, fitting in known.items():
                if weights.get(name) is not None and weights[name] not in fitting:
                    raise ValueError(
                        f"{here}: {name} is {weights[name]!r:.60} where the packed tensors have {' or '.join(map(str, fitting))}; "
                        "correct it, or dequantize the checkpoint to bf16 first"
                    )


def _meant(targets: Any, schemes: Mapping[int, Scheme], config: Config, where: str) -> list[Scheme]:
    """The schemes of those layers whose experts these targets match; of all, if they name classes of modules."""
    names = [t for t in targets or () if isinstance(t, str)] if isinstance(targets, list | None) else None
    if names is None or len(names) != len(targets or ()):
        raise ValueError(f"{where} is no list of names; correct it, or fetch it again")
    if not any(t.startswith(PATTERN) for t in names):
        return [*schemes.values()]
    family, matched = Family.of(config), []
    for layer, scheme in schemes.items():
        expert = family.expert(layer, 0)[0].removesuffix(WHOLE)
        try:
            fits = any(re.match(t.removeprefix(PATTERN), expert) for t in names if t.startswith(PATTERN))
        except re.error as error:
            raise ValueError(f"{where} has a pattern that cannot be read ({error}); correct it, or fetch it again") from None
        matched += [scheme] * fits
    return matched


def check_whole(shapes: Shapes, layer: int, config: Config, experts: int) -> None:
    """Raise ValueError if some of a layer's experts are packed and others are not: transformers loads no such layer."""
    family = Family.of(config)
    names = [n for e in range(experts) for whole in family.expert(layer, e) for n in (whole, *family.factors(whole))]
    packed = [n for n in names if n + PACKED in shapes]
    if packed and (other := next((n for n in names if n in shapes), None)):
        raise ValueError(f"{packed[0]} is packed and {other} is not: transformers loads no such layer; quantize both or neither")


def quantization_config(schemes: Mapping[int, Scheme], shapes: Shapes, config: Config) -> dict[str, Any]:
    """The `quantization_config` of a packed checkpoint, for transformers and vLLM. It ignores by name what is not packed.

    `schemes`: how each layer that is packed is, at least one. Where they differ each has a group of its own, with its layers.
    """
    family, different = Family.of(config), [*dict.fromkeys(schemes.values())]
    # a head that is tied to the embedding has no tensor, but is a module like any other
    matrices = [HEAD, *(n for n, shape in shapes.items() if n.endswith(WHOLE) and len(shape) == 2)]
    targets = {s: [family.experts_pattern(i) for i in schemes if schemes[i] == s] for s in different}
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{n}": _group(s, targets[s] if len(different) > 1 else ["Linear"]) for n, s in enumerate(different)
        },
        "ignore": sorted({family.pattern(n.removesuffix(WHOLE)) for n in matrices}),
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group or None,
        "dynamic": False,
        "observer": "minmax",
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None, "format": FORMAT}


def pack(codes_MN: "Tensor", scale_MG: "Tensor", bits: int, zero_MG: "Tensor | None" = None) -> "dict[str, Tensor]":
    """The tensors on disk, by the endings of their names, for signed codes (int8), and zero points (int8) where there are some."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    zeros = {} if zero_MG is None else {ZERO: pack_to_int32(zero_MG, bits, packed_dim=0).contiguous()}
    return {PACKED: repacked(codes_MN, bits), SCALE: scale_MG.contiguous(), SHAPE: torch.tensor(codes_MN.shape)} | zeros


def repacked(codes_MN: "Tensor", bits: int) -> "Tensor":
    """Signed codes (int8) in words [M, P] of 32 bits."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    words_MP: Tensor = pack_to_int32(codes_MN, bits)
    return words_MP


def parts_of(name: str, names: Container[str]) -> dict[str, str]:
    """The names of the tensors that a packed matrix with this name is kept in, by their endings."""
    return {end: name + end for end in (PACKED, *BESIDE) if name + end in names}


def bits_of(parts: "Mapping[str, Tensor]") -> int:
    """The bits of a code, of a packed matrix's tensors by the endings of their names."""
    return round(parts[PACKED].shape[1] * 32 / int(parts[SHAPE][1]))


def codes_of(parts: "Mapping[str, Tensor]") -> "Tensor":
    """The signed codes [M, N], int8, of a packed matrix's tensors, by the endings of their names; zero points are still in them."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    rows, columns = (int(n) for n in parts[SHAPE])
    codes_MN: Tensor = unpack_from_int32(parts[PACKED], bits_of(parts), (rows, columns))
    return codes_MN


def unpack(parts: "Mapping[str, Tensor]") -> "Tensor":
    """The matrix [M, N] of these tensors, by the endings of their names, in the precision of its scales.

    Packed codes [M, P], scales [M, G] and the shape; zero points [W, G] and two added factors where there are some.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes_MN, scale_MG, zero_WG = codes_of(parts), parts[SCALE], parts.get(ZERO)
    whole_MGg = codes_MN.float().unflatten(1, (scale_MG.shape[1], -1))
    if zero_WG is not None:
        zero_MG = unpack_from_int32(zero_WG, bits_of(parts), tuple(scale_MG.shape), packed_dim=0)
        whole_MGg = whole_MGg - zero_MG.float()[..., None]
    whole_MN = (whole_MGg * scale_MG.float()[..., None]).flatten(1)
    if ADDED_OUT in parts:
        whole_MN = whole_MN + parts[ADDED_OUT].float() @ parts[ADDED_IN].float()
    return whole_MN.to(scale_MG.dtype)


def unblocked(codes_MN: "Tensor", scale_BC: "Tensor") -> "Tensor":
    """The matrix [M, N], fp32, of FP8 codes with a scale [B, C] for each square block.

    A block's side is the smallest power of two that fits the shapes, since the last blocks may be cut off; 128 as published.
    """
    fitting = (ceil(size / blocks) for size, blocks in zip(codes_MN.shape, scale_BC.shape, strict=True))
    rows, columns = (1 << (side - 1).bit_length() for side in fitting)
    scale_MN = scale_BC.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return codes_MN.float() * scale_MN[: codes_MN.shape[0], : codes_MN.shape[1]]


def unblocks(codes_MGB: "Tensor", exponents_MG: "Tensor") -> "Tensor":
    """The matrix [M, N], bf16, of MXFP4 codes and exponents. It is exact: a value has two significant bits."""
    import torch

    values = torch.tensor((*FP4, *(-v for v in FP4)))
    value_MGN = torch.stack([values[(codes_MGB & 15).int()], values[(codes_MGB >> 4).int()]], dim=-1).flatten(-2)
    return torch.ldexp(value_MGN, exponents_MG.int()[..., None] - BIAS).flatten(1).to(torch.bfloat16)
