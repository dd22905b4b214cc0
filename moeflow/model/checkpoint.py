"""Read safetensors tensor by tensor, from a folder or a stored artifact, and turn a layer's file into a `MoELayer`.

Knows the safetensors format and the families' names; never builds a model and never reads a byte that was not asked for.
"""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from moeflow.arch import Config, arch_of
from moeflow.model.moe import MLP, MoELayer
from moeflow.model.router import Router

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Files(Protocol):
    """What a reader needs of a folder: `moeflow.step.Artifact` has it, and so has `Folder`."""

    def names(self) -> list[str]: ...
    def size(self, name: str) -> int: ...
    def read(self, name: str, start: int, stop: int) -> bytes: ...


@dataclass(frozen=True)
class Folder:
    """A folder on this machine, read like an artifact."""

    path: Path

    def names(self) -> list[str]:
        return sorted(str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file())

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def read(self, name: str, start: int, stop: int) -> bytes:
        with (self.path / name).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)


@dataclass(frozen=True)
class SingleFile:
    """One file on this machine, whatever it is called, read as the one safetensors file of a folder."""

    path: Path

    def names(self) -> list[str]:
        return ["layer.safetensors"]

    def size(self, name: str) -> int:
        return self.path.stat().st_size

    def read(self, name: str, start: int, stop: int) -> bytes:
        return Folder(self.path.parent).read(self.path.name, start, stop)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes [start, stop) of `file`."""

    file: str
    dtype: str  # as safetensors writes it: "BF16"
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


def read_header(file: str, size: int, read: Callable[[int, int], bytes]) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file of `size` bytes, of which `read(start, stop)` gives a range.

    Raises ValueError where the file is cut short or no safetensors file at all.
    """
    try:
        (length,) = struct.unpack("<Q", read(0, 8))
        if length + 8 > size:
            raise ValueError
        header = json.loads(read(8, 8 + length))
    except (ValueError, struct.error):
        raise ValueError(f"{file} ({size:,} bytes) is truncated or no safetensors file; fetch it again") from None
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (8 + length + at for at in entry["data_offsets"])
            tensors[name] = TensorInfo(file, entry["dtype"], tuple(entry["shape"]), start, stop)
    end = max((t.stop for t in tensors.values()), default=8 + length)
    if end > size:
        raise ValueError(f"{file} is truncated: it holds {size:,} of {end:,} bytes; fetch it again")
    return tensors


class Tensors(Mapping[str, Tensor]):
    """The tensors of all safetensors files of an artifact or folder, each read by its byte range when it is asked for."""

    def __init__(self, files: Files | Path) -> None:
        if isinstance(files, Path):
            files = Folder(files) if files.is_dir() else SingleFile(files)
        self.files: Files = files
        self.info: dict[str, TensorInfo] = {}
        for name in (n for n in files.names() if n.endswith(".safetensors")):
            self.info |= read_header(name, self.files.size(name), lambda a, b, name=name: self.files.read(name, a, b))  # type: ignore[misc]

    @staticmethod
    def config(files: Files) -> Config:
        """The config.json beside the tensors."""
        return json.loads(files.read("config.json", 0, files.size("config.json")))

    def __getitem__(self, name: str) -> Tensor:
        info = self.info[name]
        data = bytearray(self.files.read(info.file, info.start, info.stop))
        if not data:
            return torch.empty(info.shape, dtype=DTYPES[info.dtype])
        return torch.frombuffer(data, dtype=DTYPES[info.dtype]).reshape(info.shape)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)


def read_config(folder: Path) -> Config:
    return json.loads((folder / "config.json").read_text())


def experts_in(names: Iterable[str], config: Config, layer: int) -> int:
    """The number of routed experts that a layer's tensor names speak of: 0 for a dense layer."""
    first = arch_of(config).gate.format(layer=layer, expert="\0").split("\0")
    return len({n for n in names if n.startswith(first[0]) and n.endswith(first[1])})


def read_moe(tensors: Mapping[str, Tensor], config: Config, layer: int) -> MoELayer:
    """The MoE block of one decoder layer, with as many experts as the file has. Raises KeyError where a tensor is missing."""
    arch = arch_of(config)
    count = experts_in(tensors, config, layer)
    act = str(config.get("hidden_act", "silu"))

    def named(template: str) -> Tensor:
        return tensors[template.format(layer=layer)]

    def mlp(gate: str, up: str, down: str) -> MLP:
        return MLP(tensors[gate], tensors[up], tensors[down], act)

    router_ED = named(arch.router)
    if router_ED.shape[0] != count:
        raise ValueError(f"layer {layer} has {count} experts and a router of {router_ED.shape[0]} rows")
    gate, up, down = (t.format(layer=layer) for t in arch.shared or ("", "", ""))
    return MoELayer(
        router=Router.of(arch, config, None if arch.router_bias is None else named(arch.router_bias).float()),
        router_ED=router_ED,
        experts=tuple(mlp(*arch.expert(layer, e)) for e in range(count)),
        shared=None if arch.shared is None else mlp(gate, up, down),
        shared_gate_1D=None if arch.shared_gate is None else named(arch.shared_gate),
    )


def kept(names: Iterable[str], config: Config, layer: int, experts: list[int]) -> dict[str, tuple[str, bool]]:
    """How a layer's file is rewritten when only `experts` stay: old name to (new name, whether its rows are sliced).

    A name that is not in the answer is dropped. Experts are renumbered from zero in the given order.
    """
    arch = arch_of(config)
    renamed: dict[str, str] = {}
    for new, old in enumerate(experts):
        renamed |= dict(zip(arch.expert(layer, old), arch.expert(layer, new), strict=True))
    first = arch.gate.format(layer=layer, expert="\0").split("\0")[0]
    sliced = set(arch.router_tensors(layer))
    answer = {}
    for name in names:
        if name.startswith(first):
            # quantization scales and the like follow the matrix whose name they extend
            stem = next((old for old in renamed if name == old or name.startswith(old + "_")), None)
            if stem is not None:
                answer[name] = (renamed[stem] + name[len(stem) :], False)
        else:
            answer[name] = (name, name in sliced)
    return answer


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file whose bytes depend on the tensors alone."""
    save_file({n: tensors[n].contiguous() for n in sorted(tensors)}, path, metadata={"format": "pt"})
