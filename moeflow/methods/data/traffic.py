"""What a serving engine recorded of its requests (docs/traffic.md), read and compared with the model. No torch.

Suffixes: E experts.
"""

import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moeflow.arch import Family, family_config
from moeflow.methods.data.readers import Files, reader, rows_of
from moeflow.methods.data.traffic_rows import COLUMNS, SUMS, Served, Sums, requests_of, sums_of
from moeflow.methods.graph import Model
from moeflow.model.layout import file_of

if TYPE_CHECKING:
    from moeflow.sources import Source


@dataclass
class Traffic:
    """All that was recorded: the sums of every MoE layer, and the tokens of those requests that have them."""

    sums: dict[int, Sums] = field(default_factory=dict)
    documents: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def weighed(self) -> bool:
        """Whether routing weights are known of every token."""
        return all(s.weight_E is not None for s in self.sums.values())

    def add(self, layer: int, more: Sums) -> None:
        if (one := self.sums.get(layer)) is None:
            self.sums[layer] = more
            return
        weight_E = None if one.weight_E is None or more.weight_E is None else one.weight_E + more.weight_E
        self.sums[layer] = Sums(
            one.tokens + more.tokens, one.count_E + more.count_E, one.together_EE + more.together_EE, weight_E
        )  # fmt: skip

    def write(self, folder: Path) -> None:
        """Write each layer's sums as a pass of the model would: `count_E`, `tokens` and `together_EE`, and `weight_E` if known."""
        from safetensors.numpy import save_file

        for layer, s in self.sums.items():
            tensors = {"count_E": s.count_E, "tokens": np.array(s.tokens, np.int64), "together_EE": s.together_EE}
            save_file(tensors | ({"weight_E": s.weight_E} if self.weighed else {}), folder / file_of(layer))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Held:
    """What a plan has to know of a traffic."""

    weighed: bool
    ids: int
    """The token ids of all requests together."""


def served(model: Model) -> Served:
    """What a traffic is compared with. Raises ValueError if a run decides the model's experts."""
    family = Family.of(model.config)
    for i in model.moe_layers:
        if model.layers[i].spec.output.share < 1:
            raise ValueError(f"how many experts layer {i} has is decided by a run; a traffic is of a model that was served")
    experts = tuple((i, model.layers[i].spec.output.experts) for i in model.moe_layers)
    config = family_config(model.config)
    sizes = int(config["hidden_size"]), int(config["vocab_size"])
    return Served(family.arch.model_type, len(model.layers), experts, family.top_k, *sizes)


def read(files: Files, of: Served) -> Traffic:
    """Everything in these files. Raises ValueError, with file and line, for a row that cannot be or is of another model."""
    traffic = Traffic()
    for name, path in files:
        if reader(name) != "json":
            raise ValueError(f"{name} is no traffic; it is .json or .jsonl, packed or not (docs/traffic.md)")
        for at, row in rows_of(name, path, COLUMNS, {}):
            try:
                _add(traffic, row, of)
            except ValueError as error:
                raise ValueError(f"{name}, {at}: {error}") from None
    where = files[0][0] + f" and {len(files) - 1} more files" * bool(files[1:])
    for layer, _ in of.experts:
        if layer not in traffic.sums or not traffic.sums[layer].tokens:
            raise ValueError(f"{where} has no routed token of layer {layer}; record more, or name all of its files")
    return traffic


def _add(traffic: Traffic, row: dict, of: Served) -> None:
    if SUMS in row:
        for layer, sums in sums_of(row, of).items():
            traffic.add(layer, sums)
        return
    for request in requests_of(row, of):
        for at, (layer, experts) in enumerate(of.experts):
            traffic.add(layer, request.sums(at, experts))
        if len(request.ids) > 1:
            traffic.documents.append(request.ids)


@lru_cache(maxsize=8)
def held(source: "Source", of: Served) -> Held:
    """What a pinned traffic holds; all of it is read. Raises ValueError as `read` does."""
    with tempfile.TemporaryDirectory() as folder:
        files: Files = []
        for at, file in enumerate(source.files):
            path = source.path(file.name)
            if path is None:
                path = Path(folder) / str(at)
                path.write_bytes(source.read(file.name))
            files.append((file.name, path))
        traffic = read(files, of)
    return Held(traffic.weighed, sum(map(len, traffic.documents)))
