"""Layers of a model as they arrive from files: the next is read, and moved to a GPU, while the present one is computed with."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from moeflow.machine import gpu_share
from moeflow.model.ahead import ahead
from moeflow.model.checkpoint import Tensors
from moeflow.model.layout import Files

PART = 0.1
"""How much of a GPU's memory a layer may take that is moved while another computes; of a larger one the rest is moved when its turn
comes. Beside the layer that computes there are those of the next and, where its tensors are asked for again, its own."""

T = TypeVar("T")


class Moved(Tensors):
    """The tensors of some files, of which the first that take `room` bytes are on a device before they are asked for, unpacked if
    they are packed.

    They are copied on a CUDA stream of their own, so that what another thread computes there meanwhile goes on.
    """

    def __init__(self, files: Files | Path, device: torch.device, room: int) -> None:
        super().__init__(files)
        self._here: dict[str, Tensor] = {}
        beside = _stream(device)
        with torch.cuda.stream(beside):
            for name in self:
                tensor = super().lent(name)
                room -= tensor.nbytes
                if room < 0:
                    break
                self._here[name] = tensor.to(device)
        if beside is not None:
            beside.synchronize()

    def __getitem__(self, name: str) -> Tensor:
        return self._arrived(name) if name in self._here else super().__getitem__(name)

    def lent(self, name: str) -> Tensor:
        """The tensor with this name, not to be written to."""
        return self._arrived(name) if name in self._here else super().lent(name)

    def drop(self) -> None:
        self._here.clear()

    def _arrived(self, name: str) -> Tensor:
        tensor = self._here[name]
        if tensor.is_cuda:  # once freed its memory belongs to the other stream, which waits for this one
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor


def memory_of(device: torch.device) -> int:
    """The bytes of a GPU that this process may take: all of it, or its share."""
    return int(gpu_share() * torch.cuda.get_device_properties(device).total_memory)


def arriving(layers: Iterable[tuple[T, Path | Files]], device: torch.device) -> Iterator[tuple[T, Tensors]]:
    """The tensors of these layers in order, each beside what its file came with; on a GPU they have been moved already.

    Each file is asked for one ahead, in a thread.
    """
    if device.type != "cuda":
        return ahead((name, Tensors(file)) for name, file in layers)
    room = int(PART * memory_of(device))
    return ahead((name, Moved(file, device, room)) for name, file in layers)


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that tensors are copied on; always the same one, because freed memory stays with the stream that it was for."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
