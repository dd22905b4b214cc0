"""Read safetensors files tensor by tensor, from a folder or a stored artifact, and turn a layer's file into a `MoELayer`.

This file knows the safetensors format and the families' names. It builds no model of transformers, and reads only what is needed.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moeflow.arch import Config, Family
from moeflow.model.header import TensorInfo
from moeflow.model.layout import Files, Folder, SingleFile, experts_in, headers
from moeflow.model.moe import CLAMPED, MLP, Activation, Clamped, LowRank, Matrix, MoELayer
from moeflow.model.packed import BLOCKS, PACKED, SCALES, block_scale, logical, parts_of, unblocked, unblocks, unpack
from moeflow.model.router import Router

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "F4": torch.float4_e2m1fn_x2,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
AT_ONCE = 1 << 28


class Tensors(Mapping[str, Tensor]):
    """The tensors of all safetensors files of an artifact or folder. Each is read, by its byte range, when it is used.

    A matrix that is packed, in FP8 or in MXFP4 has its plain name here and is unpacked when it is read. `info` describes what is in
    the files.
    """

    def __init__(self, files: Files | Path) -> None:
        if isinstance(files, Path):
            files = Folder(files) if files.is_dir() else SingleFile(files)
        self.files: Files = files
        self.info = headers(files)
        self._names = dict.fromkeys(logical(self.info))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names or name in self.info:
            plain = self._read(name)
            scale = block_scale(name, self.info)
            return plain if scale is None else unblocked(plain, self._read(scale))
        if name + BLOCKS in self.info:
            return unblocks(self._read(name + BLOCKS), self._read(name + SCALES))
        return unpack({end: self._read(n) for end, n in parts_of(name, self.info).items()})

    def lent(self, name: str) -> Tensor:
        """The tensor with this name, to be copied and never written to: it may be the pages of its file themselves."""
        plain = name in self.info and block_scale(name, self.info) is None
        return self._read(name, own=False) if plain else self[name]

    def drop(self) -> None:
        """Let go of what is in memory of them already; what is asked for later is read again."""

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def packed(self, name: str) -> dict[str, Tensor]:
        """The tensors that a packed matrix is kept in, by their own names; none if it is not packed."""
        parts = parts_of(name, self.info)
        return {n: self._read(n) for n in parts.values()} if PACKED in parts else {}

    def _read(self, name: str, *, own: bool = True) -> Tensor:
        info = self.info[name]
        return tensor_of(self.files.read(info.file, info.start, info.stop), info, own=own)


def read_moe(tensors: Mapping[str, Tensor], config: Config, layer: int, *, experts: bool = True) -> MoELayer:
    """The MoE block of one decoder layer, with as many experts as the file has. Raises KeyError if a tensor is missing.

    With `experts=False` it has only its router and its shared expert; `read_expert` reads the routed experts one by one.
    """
    family = Family.of(config)
    count = experts_in(tensors, config, layer)

    bias, offset = family.router_bias(layer), family.router_offset(layer)
    shared, shared_gate = family.shared(layer), family.shared_gate(layer)
    router_ED = tensors[family.router(layer)]
    if router_ED.shape[0] != count:
        raise ValueError(f"layer {layer} has {count} experts and a router of {router_ED.shape[0]} rows")
    return MoELayer(
        router=Router.of(family, count, None if bias is None else tensors[bias].float().view(-1)),
        router_ED=router_ED,
        experts=tuple(read_expert(tensors, config, layer, e) for e in range(count if experts else 0)),
        shared=_mlp(tensors, config, shared) if shared else None,
        shared_gate_1D=None if shared_gate is None else tensors[shared_gate],
        offset_E=None if offset is None else tensors[offset],
    )


def read_expert(tensors: Mapping[str, Tensor], config: Config, layer: int, expert: int) -> MLP:
    """One routed expert of a layer. Raises KeyError if a tensor is missing."""
    family = Family.of(config)
    return _mlp(tensors, config, family.expert(layer, expert), family.expert_biases(layer, expert))


def activation(config: Config) -> Activation:
    """What experts compute between their matrices: the family's own activation, or the one that config.json names."""
    keys = ("hidden_act", "hidden_activation", "mlp_hidden_act")
    name = Family.of(config).arch.activation or next((str(config[k]) for k in keys if config.get(k)), "silu")
    if name != CLAMPED:
        return name
    given = {n: float(config[k]) for n, k in (("alpha", "swiglu_alpha"), ("limit", "swiglu_limit")) if config.get(k) is not None}
    return Clamped(**given)


def _mlp(tensors: Mapping[str, Tensor], config: Config, names: Sequence[str], biases: Sequence[str] = ()) -> MLP:
    def matrix(name: str) -> Matrix:
        out, inner = Family.of(config).factors(name)
        return tensors[name] if out not in tensors else LowRank(tensors[out], tensors[inner])

    *gate, up, down = map(matrix, names)
    return MLP(gate[0] if gate else None, up, down, activation(config), tuple(tensors[b] for b in biases))


def of_experts(tensor: Tensor, experts: list[int]) -> Tensor:
    """A router's tensor with these experts alone: their rows, or their columns where it has a single row."""
    return tensor[:, experts] if tensor.dim() > 1 and len(tensor) == 1 else tensor[experts]


def read_many(files: Files, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """These tensors one after the other. Tensors that are neighbours in a file are read together, up to `AT_ONCE` bytes."""
    run: list[tuple[str, TensorInfo]] = []
    for name, info in [*sorted(tensors.items(), key=lambda t: (t[1].file, t[1].start)), ("", None)]:
        if run and (
            info is None or info.file != run[-1][1].file or info.start != run[-1][1].stop or info.stop - run[0][1].start > AT_ONCE
        ):
            data = files.read(run[0][1].file, run[0][1].start, run[-1][1].stop)
            for tensor, at in run:
                start = at.start - run[0][1].start
                yield tensor, tensor_of(data[start : start + at.nbytes], at)
            run = []
        if info is not None:
            run.append((name, info))


def tensor_of(data: bytes | memoryview, info: TensorInfo, *, own: bool = True) -> Tensor:
    """The tensor with these bytes, and the dtype and shape of `info`; torch has two 4-bit floats in an element.

    Without memory of its `own` it shares that of the data, and must not be written to.
    """
    shape = (*info.shape[:-1], info.shape[-1] // 2) if info.dtype == "F4" else info.shape
    if not data:
        return torch.empty(shape, dtype=DTYPES[info.dtype])
    if own:
        return torch.frombuffer(bytearray(data), dtype=DTYPES[info.dtype]).reshape(shape)
    with warnings.catch_warnings():  # torch warns that nothing guards what cannot be written to
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(data, dtype=DTYPES[info.dtype]).reshape(shape)


def is_finite(name: str, tensor: Tensor) -> bool:
    """Whether no number of a tensor with this name on disk is NaN or infinite."""
    if name.endswith(SCALES) and tensor.dtype == torch.uint8:
        return not bool((tensor == 255).any())
    if not tensor.is_floating_point() or tensor.dtype == torch.float4_e2m1fn_x2:
        return True
    # FP8 has no infinity, and torch cannot check it for NaN
    return bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all())


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Its bytes depend on the tensors alone, not on their order."""
    save_file({n: tensors[n].contiguous() for n in sorted(tensors)}, path, metadata={"format": "pt"})
