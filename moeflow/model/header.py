"""The headers of safetensors files: all that a header says is checked before it is used. No torch."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moeflow.model.json_file import json_object, kind_of
from moeflow.model.spec import BITS, tensor_bytes

LARGEST = 100_000_000  # bytes of a header; the safetensors library reads no larger one
FIELDS = ("data_offsets", "dtype", "shape")
LONGEST = 500  # characters of a tensor's name


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: bytes [start, stop) of `file`."""

    file: str
    dtype: str  # as safetensors writes it: "BF16"
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def read_header(file: str, size: int, read: Callable[[str, int, int], bytes | memoryview]) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file of `size` bytes; `read(file, start, stop)` returns a range of its bytes.

    Raises ValueError if the file is truncated or no safetensors file, and if its header is too large, does not describe every byte
    behind it exactly once, or names a dtype that is not known.
    """
    length = struct.unpack("<Q", read(file, 0, 8))[0] if size >= 8 else 0
    if not 2 <= length <= size - 8:
        raise ValueError(f"{file} ({size:,} bytes) is truncated or no safetensors file; fetch it again")
    if length > LARGEST:
        raise ValueError(
            f"{file}: its header of {length:,} bytes is larger than the {LARGEST:,} that safetensors allows; fetch it again"
        )
    header, begin = json_object(bytes(read(file, 8, 8 + length)), f"the header of {file}"), 8 + length
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{file}: __metadata__ of its header is no object of strings; save it again with safetensors")
    tensors = {name: _tensor(file, name, entry, begin) for name, entry in header.items()}
    if (end := max((t.stop for t in tensors.values()), default=begin)) > size:
        raise ValueError(f"{file} is truncated: it holds {size:,} of {end:,} bytes; fetch it again")
    at, before = begin, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda t: (t[1].start, t[1].stop)):
        if tensor.start != at:
            what = "overlaps" if tensor.start < at else "leaves a hole behind"
            raise ValueError(f"{file}: {name!r} {what} {before} (data_offsets of its header); fetch it again")
        at, before = tensor.stop, repr(name)
    if at != size:
        raise ValueError(f"{file} has {size - at:,} bytes behind its last tensor that its header does not name; fetch it again")
    return tensors


def _tensor(file: str, name: str, entry: Any, begin: int) -> TensorInfo:
    """One entry of a header whose data begins at the byte `begin`. Raises ValueError if it contradicts itself."""
    if not name or len(name) > LONGEST or not name.isprintable():
        raise ValueError(f"{file}: a tensor is named {name[:60]!r}; a name has 1 to {LONGEST} printable characters, save it again")
    where = f"{file}: tensor {name!r}"
    if not isinstance(entry, dict) or sorted(entry) != [*FIELDS]:
        what = f"the fields {', '.join(sorted(entry)) or 'none'}" if isinstance(entry, dict) else kind_of(entry)
        raise ValueError(f"{where} has {what[:90]} where its header needs {', '.join(FIELDS)}; fetch it again")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{where} has dtype {kind_of(dtype)}, which is not known; convert it to one of {', '.join(BITS)}")
    if not _counts(shape):
        raise ValueError(f"{where} has shape {shape!r:.60}, which is no list of whole numbers from 0; fetch it again")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} has data_offsets {offsets!r:.60}, which are no begin and end; fetch it again")
    if dtype == "F4" and (not shape or shape[-1] % 2):
        raise ValueError(f"{where} has shape {shape!r:.60} in F4, which has two numbers in a byte; fetch it again")
    start, stop = offsets
    if stop - start != (needed := tensor_bytes(dtype, tuple(shape))):
        raise ValueError(
            f"{where} has {stop - start:,} bytes (data_offsets) where {dtype} {shape!r:.60} needs {kind_of(needed)}; fetch it again"
        )
    return TensorInfo(file, dtype, tuple(shape), begin + start, begin + stop)


def _counts(value: Any) -> bool:
    """Whether this is a list of numbers of things, each from 0 to 2**63."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
