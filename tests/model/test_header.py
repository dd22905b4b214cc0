"""The header of a safetensors file is checked before it is read, and what other libraries write passes."""

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moeflow.model.header import read_header
from moeflow.model.layout import Folder


def test_a_header_of_three_gigabytes_is_refused_without_reading_it() -> None:
    asked: list[tuple[int, int]] = []

    def read(file: str, start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return struct.pack("<Q", 3 << 30)

    with pytest.raises(
        ValueError, match="its header of 3,221,225,472 bytes is larger than the 100,000,000 that safetensors allows"
    ):
        read_header("x.safetensors", 4 << 30, read)
    assert asked == [(0, 8)]


def test_every_shape_and_dtype_that_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.zeros(2, 3),
        "empty": torch.zeros(0, 4).half(),
        "number": torch.tensor(1),
        "truths": torch.ones(3) > 0,
    }
    tensors |= {"brain": torch.zeros(5).bfloat16(), "eight bits": torch.zeros(2, 2).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    size = (tmp_path / "x.safetensors").stat().st_size
    known = read_header("x.safetensors", size, Folder(tmp_path).read)
    assert {n: t.shape for n, t in known.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert all(known[n].nbytes == t.nbytes for n, t in tensors.items())
    save_file({}, tmp_path / "none.safetensors")
    assert read_header("none.safetensors", (tmp_path / "none.safetensors").stat().st_size, Folder(tmp_path).read) == {}
