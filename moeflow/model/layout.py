"""The files of a layer, and the names of its tensors when experts are taken out. No torch."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moeflow.arch import Config, Family, is_number
from moeflow.model.header import TensorInfo, read_header

LAYER = "layer.safetensors"
"""The file of a decoder layer's tensors, in the folder of the step that made it."""

ROUTING = "routing.safetensors"
"""The file beside it for what a later step adds: a threshold of skipping, or Compressed Experts."""

ESSENTIAL = "essential.json"
"""The file with the part of config.json that changes what the model computes."""


def file_of(layer: int) -> str:
    """The file of what a pass recorded in an MoE layer."""
    return f"layer-{layer:03d}.safetensors"


def file_before(layer: int) -> str:
    """The file of the hidden states before a layer that a pass recorded."""
    return f"before-{layer:03d}.safetensors"


def file_beside(layer: int) -> str:
    """The file of what an MoE layer's block is added to, of the tokens that a pass recorded."""
    return f"beside-{layer:03d}.safetensors"


def file_for(name: str) -> str:
    """The file of a layer's folder that has the tensor with this name."""
    return ROUTING if ".experts.skip." in name or ".experts.compressed." in name else LAYER


class Files(Protocol):
    """What a reader needs from a folder. `moeflow.step.Artifact` and `Folder` are such."""

    def names(self) -> list[str]: ...
    def size(self, name: str) -> int: ...
    def read(self, name: str, start: int, stop: int) -> bytes | memoryview: ...


@dataclass(frozen=True)
class Folder:
    """A folder on this machine, read like an artifact."""

    path: Path

    def names(self) -> list[str]:
        return sorted(str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file())

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def read(self, name: str, start: int, stop: int) -> bytes | memoryview:
        with (self.path / name).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)


@dataclass(frozen=True)
class SingleFile:
    """One file on this machine, with any name, read like a folder with one safetensors file."""

    path: Path

    def names(self) -> list[str]:
        return [LAYER]

    def size(self, name: str) -> int:
        return self.path.stat().st_size

    def read(self, name: str, start: int, stop: int) -> bytes | memoryview:
        return Folder(self.path.parent).read(self.path.name, start, stop)


def headers(files: Files) -> dict[str, TensorInfo]:
    """The tensors of all safetensors files of a folder or artifact."""
    tensors: dict[str, TensorInfo] = {}
    for name in (n for n in files.names() if n.endswith(".safetensors")):
        tensors |= read_header(name, files.size(name), files.read)
    return tensors


def read_config(files: Files) -> Config:
    """The configuration in a folder or artifact: `ESSENTIAL` if there is one, otherwise config.json."""
    name = ESSENTIAL if ESSENTIAL in files.names() else "config.json"
    return json.loads(bytes(files.read(name, 0, files.size(name))))


def experts_in(names: Iterable[str], config: Config, layer: int) -> int:
    """The number of routed experts in a layer, counted by the names of its tensors; 0 for a dense layer."""
    first = Family.of(config).experts(layer)
    return len({e for n in names if n.startswith(first) and is_number(e := n.removeprefix(first).split(".")[0])})


def names_without_experts(names: Iterable[str], config: Config, layer: int, *, whole: bool = False) -> list[str]:
    """The names that remain of a layer without its routed experts. The shared expert stays.

    Without a shared expert, or if `whole`, nothing of the MoE block remains, and neither does the norm before it if it feeds the
    block alone.
    """
    family = Family.of(config)
    routed = (family.experts(layer), *family.router_tensors(layer))
    block = (family.moe(layer), *([] if family.arch.norm_feeds_more else [family.norm(layer)]))
    gone = block if whole or not family.arch.shared else routed
    return [n for n in names if not n.startswith(gone)]


def kept(names: Iterable[str], config: Config, layer: int, experts: list[int]) -> dict[str, tuple[str, bool]]:
    """How a layer's file is rewritten if only `experts` stay: old name to (new name, whether its rows are sliced).

    Names that are not in the result are dropped. Experts are renumbered from zero in the order of `experts`.
    """
    family = Family.of(config)
    first = family.experts(layer)
    sliced = set(family.router_tensors(layer))
    answer = {}
    for name in names:
        if name.startswith(first) and name not in sliced:  # a family may keep a vector of its router there
            old, _, tail = name.removeprefix(first).partition(".")
            if int(old) in experts:
                answer[name] = (f"{first}{experts.index(int(old))}.{tail}", False)
        else:
            answer[name] = (name, name in sliced)
    return answer
